"""Mochi, as diffusers builds it."""

from typing import Any

from diffusers.models.attention_processor import MochiAttnProcessor2_0
from torch import Tensor, arange, cat, nn, stack
from torch.utils.hooks import RemovableHandle

from psa_integrations.diffusers.adapter import (
    Adapter,
    CurrentOrder,
    Processor,
    SelfAttention,
    in_order,
    order_output,
    undo_output,
)
from psa_masks import VideoGrid


class MochiAdapter(Adapter):
    """MochiTransformer3DModel: text behind the video in its self-attention, its padding left out sample by sample."""

    processor_classes = (MochiAttnProcessor2_0,)
    no_context_parallel = "diffusers has no plan to cut it, and its own attention joins no parts in dense steps"

    def attentions(self, transformer: Any) -> list[Any]:
        return [block.attn1 for block in transformer.transformer_blocks]

    def model(self, transformer: Any, pipeline: Any | None) -> str | None:
        config = transformer.config
        return "Mochi" if (config.num_layers, config.num_attention_heads) == (48, 24) else None

    def grid(self, transformer: Any, call: dict[str, Any]) -> VideoGrid:
        frames, height, width = call["hidden_states"].shape[2:]
        patch = transformer.config.patch_size
        return VideoGrid(
            frames=frames,
            height=height // patch,
            width=width // patch,
            text=call["encoder_hidden_states"].shape[1],
        )

    def order_hooks(self, transformer: Any, current: CurrentOrder) -> list[RemovableHandle]:
        def order_tokens(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            order = current()
            if order is None:
                return None
            # [B * T, H * W, C]: it sees each frame alone, and the model joins them next.
            tokens = output.reshape(-1, len(order), output.shape[2])
            return in_order(tokens, order, 1, "the patch embedding").view_as(output)

        return [
            order_output(transformer.rope, current, 0, "the rotary table"),
            transformer.patch_embed.register_forward_hook(order_tokens),
            undo_output(transformer.proj_out, current),
        ]

    def processor(self, original: Any, attention: SelfAttention, layer: int) -> Processor:
        return MochiProcessor(original, attention, layer)


class MochiProcessor(Processor):
    """Joint self-attention of the video and text tokens of a Mochi block."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        # The mask [B, text] is no mask of the attention: the model takes the tokens it names out of the text.
        if not self.attention.runs_sparse(self, hidden_states, None):
            dense: tuple[Tensor, Tensor] = self.original(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
            return dense
        video = hidden_states.shape[1]
        exists = attention_mask.bool()
        # As in the model, text that exists moves to the front of the text, and stays there.
        text = encoder_hidden_states.take_along_dim((~exists).int().argsort(dim=1, stable=True)[:, :, None], dim=1)
        query, key, value = (
            project(hidden_states).unflatten(2, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )  # [B, L, H, D]
        added_query, added_key, added_value = (
            x.unflatten(2, (attn.heads, -1))
            for x in (attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text))
        )
        query, key = attn.norm_q(query), attn.norm_k(key)
        added_query, added_key = attn.norm_added_q(added_query), attn.norm_added_k(added_key)
        if image_rotary_emb is not None:
            query, key = rotate(query, *image_rotary_emb), rotate(key, *image_rotary_emb)
        query, key, value = (
            cat(pair, dim=1).transpose(1, 2) for pair in ((query, added_query), (key, added_key), (value, added_value))
        )
        kv_lengths = video + exists.sum(dim=1)
        out = self.attention.attend(self, query, key, value, kv_lengths=kv_lengths)
        out = out.transpose(1, 2).flatten(2)
        padding = arange(out.shape[1], device=out.device) >= kv_lengths[:, None]
        out = out.masked_fill(padding[:, :, None], 0.0)
        out_video, out_text = attn.to_out[1](attn.to_out[0](out[:, :video])), out[:, video:]
        # The last block has no use for its text.
        if hasattr(attn, "to_add_out"):
            out_text = attn.to_add_out(out_text)
        return out_video, out_text


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `x` [B, L, H, D], whose channels 2i and 2i+1 are one plane.

    `cos` and `sin` [L, H, D / 2] hold each plane's value, learned per head.
    """
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)
