"""Wan 2.1 and 2.2, as diffusers builds them."""

from typing import Any

from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, addcmul, empty_like, nn
from torch.utils.hooks import RemovableHandle

from psa_integrations.diffusers.adapter import (
    Adapter,
    CurrentOrder,
    DispatchedProcessor,
    Order,
    Processor,
    SelfAttention,
    in_order,
    undo_output,
)
from psa_integrations.diffusers.parallel import ulysses_of
from psa_masks import VideoGrid


class WanAdapter(Adapter):
    """WanTransformer3DModel: no text in its self-attention, `[batch, token]` timesteps in TI2V-5B."""

    processor_classes = (WanAttnProcessor,)
    no_context_parallel = None

    def attentions(self, transformer: Any) -> list[Any]:
        return [block.attn1 for block in transformer.blocks]

    def model(self, transformer: Any, pipeline: Any | None) -> str | None:
        config = transformer.config
        if tuple(config.patch_size) == (1, 4, 4):
            return "tiny-wan"
        if config.in_channels == 48:
            return "Wan2.2_5B"
        if (config.num_layers, config.num_attention_heads) == (30, 12):
            return "Wan2.1_1.3b"
        of_pipeline = getattr(pipeline, "config", None)
        if (config.num_layers, config.num_attention_heads) == (40, 40) and of_pipeline is not None:
            # The transformers of 2.1 14B and of 2.2 A14B have one shape; only the pipeline tells them apart.
            two_stages = getattr(of_pipeline, "boundary_ratio", None) is not None
            return "Wan2.2_A14B" if two_stages else "Wan2.1_14b"
        return None

    def grid(self, transformer: Any, call: dict[str, Any]) -> VideoGrid:
        frames, height, width = call["hidden_states"].shape[2:]
        patch_t, patch_h, patch_w = transformer.config.patch_size
        return VideoGrid(frames=frames // patch_t, height=height // patch_h, width=width // patch_w)

    def order_call(self, call: dict[str, Any], order: Order) -> None:
        if call["timestep"].ndim == 2:
            call["timestep"] = in_order(call["timestep"], order, 1, "timestep")

    def order_hooks(self, transformer: Any, current: CurrentOrder) -> list[RemovableHandle]:
        def order_tokens(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            order = current()
            if order is None:
                return None
            # [B, C, T, H, W], which the model flattens to tokens next. The first block would be the easier place, but
            # then it alone would have a hook, and be another graph than the rest where blocks are compiled.
            return in_order(output.flatten(2), order, 2, "the patch embedding").view_as(output)

        def order_rotary(module: nn.Module, args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            order = current()
            if order is None:
                return None
            ulysses = ulysses_of(transformer)
            if ulysses is not None:  # diffusers has cut the table by now, and will cut the tokens
                return tuple(ulysses.order(table, order, 1) for table in output)
            return tuple(in_order(table, order, 1, "the rotary table") for table in output)

        return [
            transformer.rope.register_forward_hook(order_rotary),
            transformer.patch_embedding.register_forward_hook(order_tokens),
            undo_output(transformer.proj_out, current),
        ]

    def processor(self, original: Any, attention: SelfAttention, layer: int) -> Processor:
        return WanProcessor(original, attention, layer)


class WanProcessor(DispatchedProcessor):
    """Self-attention of a Wan block."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if not self.attention.runs_sparse(self, hidden_states, attention_mask):
            dense: Tensor = self.original(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
            return dense
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))  # [B, L, H, D]
        if rotary_emb is not None:
            query, key = rotate(query, *rotary_emb), rotate(key, *rotary_emb)
        out = self.attention.attend(self, query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        out = attn.to_out[0](out.transpose(1, 2).flatten(2))
        projected: Tensor = attn.to_out[1](out)
        return projected


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `x` [B, L, H, D], whose channels 2i and 2i+1 are one plane.

    `cos` and `sin` [1, L, 1, D] hold each plane's value twice.
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = empty_like(x)
    out[..., 0::2] = addcmul(even * cos, odd, sin, value=-1)
    out[..., 1::2] = addcmul(even * sin, odd, cos)
    return out
