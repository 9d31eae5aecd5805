"""LTX-Video, as diffusers builds it."""

from typing import Any

from diffusers.models.transformers.transformer_ltx import LTXVideoAttnProcessor, apply_rotary_emb
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from psa_integrations.diffusers.adapter import (
    Adapter,
    CurrentOrder,
    DispatchedProcessor,
    Order,
    Processor,
    SelfAttention,
    in_order,
    order_output,
    undo_output,
)
from psa_masks import VideoGrid


class LTXAdapter(Adapter):
    """LTXVideoTransformer3DModel: tokens as its input, no text in its self-attention, `[batch, token]` timesteps
    where the video starts from an image."""

    processor_classes = (LTXVideoAttnProcessor,)
    # Seen with diffusers 0.38 and 0.42: the mask holds every head, and the exchange gives the attention a part of them.
    no_context_parallel = "diffusers' own attention to the text fails under it where there is a text mask"

    def attentions(self, transformer: Any) -> list[Any]:
        return [block.attn1 for block in transformer.transformer_blocks]

    def model(self, transformer: Any, pipeline: Any | None) -> str | None:
        config = transformer.config
        layers = (config.num_layers, config.num_attention_heads)
        return "LTX-Video" if layers in ((28, 32), (48, 32)) else None

    def grid(self, transformer: Any, call: dict[str, Any]) -> VideoGrid | None:
        frames, height, width = (call.get(name) for name in ("num_frames", "height", "width"))
        # Pipelines with conditions anywhere in the video give coordinates instead.
        if call.get("video_coords") is not None or frames is None or height is None or width is None:
            return None
        tokens = call["hidden_states"].shape[1]
        if frames * height * width != tokens:
            raise ValueError(
                f"num_frames, height and width must be those of the {tokens} tokens of hidden_states, "
                f"got {frames} x {height} x {width}"
            )
        return VideoGrid(frames=frames, height=height, width=width)

    def order_call(self, call: dict[str, Any], order: Order) -> None:
        if call["timestep"].ndim > 1 and call["timestep"].shape[1] != 1:
            call["timestep"] = in_order(call["timestep"], order, 1, "timestep")

    def order_hooks(self, transformer: Any, current: CurrentOrder) -> list[RemovableHandle]:
        return [
            order_output(transformer.proj_in, current, 1, "hidden_states"),
            order_output(transformer.rope, current, 1, "the rotary table"),
            undo_output(transformer.proj_out, current),
        ]

    def processor(self, original: Any, attention: SelfAttention, layer: int) -> Processor:
        return LTXProcessor(original, attention, layer)


class LTXProcessor(DispatchedProcessor):
    """Self-attention of an LTX block. The rotary table is over all heads together."""

    # diffusers passes only the arguments it finds named in this signature.
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if not self.attention.runs_sparse(self, hidden_states, attention_mask):
            dense: Tensor = self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
            return dense
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        if image_rotary_emb is not None:
            query, key = apply_rotary_emb(query, image_rotary_emb), apply_rotary_emb(key, image_rotary_emb)
        query, key, value = (
            x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (query, key, attn.to_v(hidden_states))
        )  # [B, H, L, D]
        out = self.attention.attend(self, query, key, value)
        projected: Tensor = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
        return projected
