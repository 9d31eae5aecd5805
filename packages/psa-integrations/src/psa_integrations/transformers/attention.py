"""The attention function that transformers' models call."""

import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn

from psa_config import PyramidSparseAttention
from psa_integrations.attention import check_device, serves_head_dim, sparse_attention
from psa_integrations.build import mask_policy
from psa_integrations.diffusers.site import UnsupportedError
from psa_integrations.stats import StatsRecorder
from psa_integrations.transformers.masks import dense_mask, existing, is_roles
from psa_kernels.checks import MAX_HEAD_DIM

OnUnsupported = Literal["raise", "dense"]


class PyramidAttentionFunction:
    """Sparse prefill of causal self-attention; everything else is transformers' own SDPA.

    Args:
        sparse: None computes everything by SDPA.
        min_queries: calls with fewer queries, such as decoding, are SDPA's.
        stats: counts the calls of at least `min_queries` queries.
        on_unsupported: `"raise"` or `"dense"`, which warns once.
        impl: implementation of the operators, see psa_kernels.pyramid_attention.
    """

    def __init__(
        self,
        sparse: PyramidSparseAttention | None,
        *,
        min_queries: int,
        stats: StatsRecorder,
        on_unsupported: OnUnsupported,
        impl: str | None,
    ) -> None:
        self._policy = None if sparse is None else mask_policy(sparse, is_causal=True)
        self._dense_layers = frozenset[int]() if sparse is None else frozenset(sparse.dense_layers)
        self._min_queries = min_queries
        self._stats = stats
        self._on_unsupported = on_unsupported
        self._impl = impl
        self._warned = False

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Attend.

        Args:
            module: the attention module of the layer.
            query: [B, H, q_len, D].
            key: [B, H_kv, kv_len, D], H_kv a divisor of H.
            value: [B, H_kv, kv_len, D].
            attention_mask: None, key roles, or a mask as SDPA takes it.
            dropout, scaling, is_causal, options: as transformers passes them.

        Returns:
            The output [B, q_len, H, D], and None for the weights.
        """
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if causal and query.shape[2] >= self._min_queries:
            layer = int(getattr(module, "layer_idx", None) or 0)
            if self._runs_sparse(layer, query, key, value, attention_mask, dropout, options):
                return self._attend(layer, query, key, value, attention_mask, scaling).contiguous(), None
            self._stats.dense(("transformer", None, layer))
        if is_roles(attention_mask):
            assert attention_mask is not None
            attention_mask = dense_mask(attention_mask, query.shape[2], query.device)
        # Imported here because transformers takes seconds to import.
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        dense: tuple[Tensor, None] = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **options,
        )
        return dense

    def _runs_sparse(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dropout: float,
        options: dict[str, Any],
    ) -> bool:
        if self._policy is None:
            return False
        check_device(self._impl, query)
        problem = self._problem(query, key, value, mask, dropout, options)
        if problem is not None:
            message = f"pyramid sparse attention in layer {layer}: {problem}"
            if self._on_unsupported == "raise":
                raise UnsupportedError(f"{message}; on_unsupported='dense' runs such calls dense")
            if not self._warned:
                warnings.warn(f"{message}; such calls run dense", stacklevel=3)
                self._warned = True
        return problem is None and layer not in self._dense_layers

    def _problem(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dropout: float,
        options: dict[str, Any],
    ) -> str | None:
        """What sparse attention cannot do of a call."""
        window = options.get("sliding_window")
        if window is not None and window < key.shape[2]:
            return f"a sliding window of {window} keys"
        if mask is not None and not is_roles(mask):
            return f"an attention mask other than causal with padding, {mask.dtype} {list(mask.shape)}"
        if options.get("softcap") is not None:
            return f"logits capped at {options['softcap']}"
        for name in ("position_bias", "s_aux"):
            if options.get(name) is not None:
                return f"{name}, which changes the softmax"
        if dropout > 0:
            return f"dropout {dropout}"
        if options.get("output_attentions"):
            return "output_attentions, whose weights are never computed"
        if key.shape[2] < query.shape[2]:
            return f"{query.shape[2]} queries of {key.shape[2]} keys, which is no causal self-attention"
        if value.shape[3] != key.shape[3]:
            return f"values of head_dim {value.shape[3]} with keys of {key.shape[3]}"
        if not serves_head_dim(self._impl, query.shape[3]):
            return f"head_dim {query.shape[3]}, above {MAX_HEAD_DIM} only impl 'torch' and 'reference' have"
        return None

    def _attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, roles: Tensor | None, scale: float | None
    ) -> Tensor:
        """Sparse attention as [B, q_len, H, D], 0 for the queries of padding."""
        if roles is None:
            # A static cache holds room for tokens to come behind the prompt.
            length = query.shape[2]
            return self._sparse(layer, query, key[:, :, :length], value[:, :, :length], scale)
        samples = existing(roles)
        if all(torch.equal(x, y) for sample in samples for x, y in zip(sample, samples[0], strict=True)):
            samples = samples[:1]
        batch, heads, length, dim = query.shape
        if len(samples) == 1 and len(samples[0][0]) == length:
            key, value = (_take(x, samples[0][1]) for x in (key, value))
            return self._sparse(layer, query, key, value, scale)
        out = query.new_zeros(batch, length, heads, dim)
        at_once = batch // len(samples)
        for first, (queries, keys) in enumerate(samples):
            if len(queries) == 0:
                continue
            part = slice(first * at_once, (first + 1) * at_once)
            own = _take(query[part], queries), _take(key[part], keys), _take(value[part], keys)
            out[part].index_copy_(1, queries.to(out.device), self._sparse(layer, *own, scale).to(out.dtype))
        return out

    def _sparse(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        assert self._policy is not None
        out, density = sparse_attention(query, key, value, self._policy, scale=scale, impl=self._impl)
        self._stats.sparse(("transformer", None, layer), density)
        return out.transpose(1, 2)


def _take(x: Tensor, tokens: Tensor) -> Tensor:
    """`x` [B, H, L, D] at the indices `tokens`, a view where they lie side by side."""
    first, count = int(tokens[0]), len(tokens)
    if int(tokens[-1]) - first + 1 == count:
        return x[:, :, first : first + count]
    return x.index_select(2, tokens.to(x.device))
