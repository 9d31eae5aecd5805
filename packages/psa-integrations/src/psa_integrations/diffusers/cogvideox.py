"""CogVideoX 2B, 5B and 1.5, as diffusers builds them."""

from typing import Any

from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, cat, nn
from torch.utils.hooks import RemovableHandle

from psa_integrations.diffusers.adapter import (
    Adapter,
    CurrentOrder,
    Order,
    Processor,
    SelfAttention,
    in_order,
    undo_output,
)
from psa_masks import VideoGrid


class CogVideoXAdapter(Adapter):
    """CogVideoXTransformer3DModel: text first in its self-attention, frames before channels in its input."""

    processor_classes = (CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0)
    no_context_parallel = "diffusers has no plan to cut it, and its own attention joins no parts in dense steps"

    def attentions(self, transformer: Any) -> list[Any]:
        return [block.attn1 for block in transformer.transformer_blocks]

    def model(self, transformer: Any, pipeline: Any | None) -> str | None:
        config = transformer.config
        if (config.num_layers, config.num_attention_heads) != (42, 48):
            return None
        return "CogVideo_5b" if config.patch_size_t is None else "CogVideo1.5_5b"

    def grid(self, transformer: Any, call: dict[str, Any]) -> VideoGrid:
        _, frames, _, height, width = call["hidden_states"].shape
        patch, patch_t = transformer.config.patch_size, transformer.config.patch_size_t or 1
        return VideoGrid(
            frames=frames // patch_t,
            height=height // patch,
            width=width // patch,
            text=call["encoder_hidden_states"].shape[1],
            text_first=True,
        )

    def order_call(self, call: dict[str, Any], order: Order) -> None:
        rotary = call.get("image_rotary_emb")
        if rotary is not None:
            call["image_rotary_emb"] = tuple(in_order(table, order, 0, "image_rotary_emb") for table in rotary)

    def order_hooks(self, transformer: Any, current: CurrentOrder) -> list[RemovableHandle]:
        def order_tokens(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            order = current()
            if order is None:
                return None
            text = args[0].shape[1]
            video = in_order(output[:, text:], order, 1, "the patch embedding")
            return cat((output[:, :text], video), dim=1)

        return [
            transformer.patch_embed.register_forward_hook(order_tokens),
            undo_output(transformer.proj_out, current),
        ]

    def processor(self, original: Any, attention: SelfAttention, layer: int) -> Processor:
        return CogVideoXProcessor(original, attention, layer)


class CogVideoXProcessor(Processor):
    """Joint self-attention of the text and video tokens of a CogVideoX block."""

    # diffusers passes only the arguments it finds named in this signature.
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not self.attention.runs_sparse(self, hidden_states, attention_mask):
            dense: tuple[Tensor, Tensor] = self.original(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
            return dense
        text = encoder_hidden_states.shape[1]
        tokens = cat((encoder_hidden_states, hidden_states), dim=1)
        if isinstance(self.original, FusedCogVideoXAttnProcessor2_0):
            query, key, value = attn.to_qkv(tokens).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)
        query, key, value = (
            x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value)
        )  # [B, H, L, D]
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (
                cat((x[:, :, :text], apply_rotary_emb(x[:, :, text:], image_rotary_emb)), dim=2) for x in (query, key)
            )
        out = self.attention.attend(self, query, key, value)
        out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
        return out[:, text:], out[:, :text]
