"""Pyramid sparse attention as one call: importance, levels, plan, attention."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from psa_config import Preset
from psa_integrations.build import content_orders, find_preset, mask_policy, sparse_attention_of, token_order
from psa_kernels import BlockLayout, LevelPlan, checks, pyramid_attention
from psa_masks import AttentionOrder, MaskPolicy, VideoGrid


def check_impl(impl: str | None) -> None:
    """Raises ValueError if psa_kernels has no implementation of that name; None leaves it the choice."""
    if impl is not None:
        checks.choice("impl", impl, checks.IMPLS)


def serves_head_dim(impl: str | None, head_dim: int) -> bool:
    """Whether heads are not too wide for `impl`, whose own check would come only when it runs. None may be Triton."""
    return head_dim <= checks.MAX_HEAD_DIM or impl in ("torch", "reference")


def check_device(impl: str | None, tensor: Tensor) -> None:
    """Raises ValueError if `impl` is Triton, asked for by name, and Triton cannot run where `tensor` lies."""
    if impl == "triton":
        checks.impl_to_run(impl, tensor.device)  # not on a GPU too old for the kernels
    if impl == "triton" and tensor.device.type != "cuda":
        # Imported here because it imports Triton, which others do without.
        from psa_kernels.triton_device import on_device

        on_device(tensor)


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    policy: MaskPolicy,
    *,
    scale: float | None = None,
    kv_lengths: Tensor | None = None,
    order: Callable[[Tensor, Tensor], AttentionOrder] | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the levels that `policy` gives to the block pairs.

    Args:
        query: [B, H, q_len, D].
        key: [B, H_kv, kv_len, D].
        value: [B, H_kv, kv_len, D].
        policy: decides the levels, and whether attention is causal.
        scale: of the logits; None is 1/sqrt(D).
        kv_lengths: int32 or int64 [B], how many keys of each sample exist; None is all.
        order: gives the order of queries and that of keys and values, from the two; the output is in that of the
            caller. None leaves all as it comes. Keys that do not exist must stay behind the others.
        impl: implementation of every operator, see psa_kernels.pyramid_attention.

    Where the dtypes differ, as after a norm or a rotary table kept in float32, query and key are cast to the
    dtype of value, which is the one the model computes in.

    Returns:
        The output [B, H, q_len, D] in the dtype of value, and the density of what was executed, float32
        [B, H]; keys that do not exist count as if they did, in both parts of the fraction.

    Raises:
        ValueError: if there is an `order` and `policy` is causal: a key's place would no longer say who may see it.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)
    orders = None
    if order is not None:
        if policy.is_causal:
            raise ValueError("policy must not be causal where tokens are reordered, got is_causal True")
        orders = order(query, key)
        query, key, value = orders.apply(query, key, value)
    plan = plan_of(query, key, policy, scale=scale, kv_lengths=kv_lengths, impl=impl)
    out = attend_by(plan, query, key, value, scale=scale, kv_lengths=kv_lengths, impl=impl)
    return out if orders is None else orders.undo(out), plan.density()


def plan_of(
    query: Tensor,
    key: Tensor,
    policy: MaskPolicy,
    *,
    scale: float | None = None,
    kv_lengths: Tensor | None = None,
    impl: str | None = None,
    on_levels: Callable[[Tensor], None] | None = None,
) -> LevelPlan:
    """What `policy` wants executed of the attention of `query` and `key`, of one dtype.

    `on_levels` is called with the levels, int8 [B, H, num_q_blocks, num_kv_blocks]; the other arguments are as in
    `sparse_attention`.
    """
    levels = policy(query, key, scale=scale, kv_lengths=kv_lengths, impl=impl)
    if on_levels is not None:
        on_levels(levels)
    return LevelPlan.from_levels(levels, block_layout(policy, query.shape[2], key.shape[2]), impl=impl)


def block_layout(policy: MaskPolicy, q_len: int, kv_len: int) -> BlockLayout:
    """The blocks that `policy` cuts sequences into."""
    return BlockLayout(
        q_len,
        kv_len,
        block_q=policy.block_q,
        block_kv=policy.block_kv,
        num_levels=policy.num_levels,
        is_causal=policy.is_causal,
    )


def attend_by(
    plan: LevelPlan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    kv_lengths: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Attention of what `plan` holds, [B, H, q_len, D]; tensors of one dtype, arguments as in `sparse_attention`."""
    layout = plan.layout
    out = pyramid_attention(
        query,
        key,
        value,
        plan,
        block_q=layout.block_q,
        block_kv=layout.block_kv,
        is_causal=layout.is_causal,
        scale=scale,
        kv_lengths=kv_lengths,
        num_levels=layout.num_levels,
        impl=impl,
    )
    assert isinstance(out, Tensor)
    return out


class PyramidAttention(nn.Module):
    """Attention by a preset, for models that this package has no integration for.

    Args:
        preset: a psa_config.Preset, or `"Model/preset"` from the shipped presets. A dense preset is plain
            scaled_dot_product_attention. `warmup_steps`, `cooldown_steps` and `dense_layers` are the caller's
            to follow: a lone module knows neither its step nor its layer.
        grid: how the sequence lies in space and time. With it, text tokens are protected, and a preset with
            `use_rearrange` puts query, key and value in its token order and the output back in the caller's.
            Without it, tokens are taken in the order they come in. Clusters are those of one layer: with a preset that
            orders by them, give each layer a module of its own.
        impl: implementation of the operators, see psa_kernels.pyramid_attention.

    Raises:
        TypeError: if `preset` or `grid` is of another type.
        ValueError: if nothing has the name `preset` or `impl`, or `grid` has fewer video tokens than the preset
            clusters.
    """

    def __init__(self, preset: Preset | str, grid: VideoGrid | None = None, *, impl: str | None = None) -> None:
        super().__init__()
        if grid is not None and not isinstance(grid, VideoGrid):
            raise TypeError(f"grid must be a psa_masks.VideoGrid or None, got {type(grid).__name__}")
        check_impl(impl)
        self.preset = find_preset(preset)
        self.grid = grid
        self.impl = impl
        sparse = sparse_attention_of(self.preset)
        self._policy = None if sparse is None else mask_policy(sparse, grid)
        self._order = None if sparse is None or grid is None else token_order(sparse, grid)
        self._clusters = None if sparse is None or grid is None else content_orders(sparse, grid, base=self._order)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, step: int | None = None) -> Tensor:
        """Attend.

        Args:
            query: [B, H, q_len, D].
            key: [B, H_kv, kv_len, D], H_kv a divisor of H.
            value: [B, H_kv, kv_len, D].
            step: the denoising step, from 0, for presets with orders by cluster: k-means then starts from the clusters
                of the step before, and anew where steps start again. None starts anew in every call.

        Returns:
            [B, H, q_len, D] in the dtype of `value`, to which query and key are cast where they differ.

        Raises:
            TypeError: if one of the three is no floating-point tensor, or `step` no integer.
            ValueError: if one of the three has another shape, a grid was given and q_len or kv_len is not its number of
                tokens, `step` is negative, or `impl` is "triton" and the tensors are not on a GPU.
        """
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            checks.sequence(name, tensor)
        if step is not None and checks.integer("step", step) < 0:
            raise ValueError(f"step must be 0 or more, got {step}")
        if self.grid is not None:
            for name, tensor in (("query", query), ("key", key)):
                if tensor.shape[2] != self.grid.seq_len:
                    raise ValueError(
                        f"{name} must have the {self.grid.seq_len} tokens of {self.grid}, got {tensor.shape[2]}"
                    )
        if self._policy is None:
            return scaled_dot_product_attention(
                query.to(value.dtype),
                key.to(value.dtype),
                value,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        check_device(self.impl, query)
        out, _ = sparse_attention(query, key, value, self._policy, order=self._orders_at(step), impl=self.impl)
        return out

    def _orders_at(self, step: int | None) -> Callable[[Tensor, Tensor], AttentionOrder] | None:
        if self._clusters is not None:
            return partial(self._clusters, step=step, impl=self.impl)
        if self._order is not None:
            order = AttentionOrder(query=self._order, key=self._order)
            return lambda query, key: order
        return None

    def extra_repr(self) -> str:
        return f"preset={self.preset.model}/{self.preset.name}, grid={self.grid}"
