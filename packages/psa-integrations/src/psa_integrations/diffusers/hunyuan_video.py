"""HunyuanVideo, as diffusers builds it."""

from typing import Any

from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from torch import Tensor, cat
from torch.utils.hooks import RemovableHandle

from psa_integrations.diffusers.adapter import (
    Adapter,
    CurrentOrder,
    DispatchedProcessor,
    Processor,
    SelfAttention,
    order_output,
    undo_output,
)
from psa_masks import VideoGrid


class HunyuanVideoAdapter(Adapter):
    """HunyuanVideoTransformer3DModel: text behind the video in its self-attention, padded per sample.

    Its layers are the dual-stream blocks and, counted on, the single-stream ones.
    """

    processor_classes = (HunyuanVideoAttnProcessor2_0,)
    no_context_parallel = "diffusers has no plan to cut it, whose mask is over video and text together"

    def attentions(self, transformer: Any) -> list[Any]:
        return [block.attn for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks)]

    def model(self, transformer: Any, pipeline: Any | None) -> str | None:
        config = transformer.config
        layers = (config.num_layers, config.num_single_layers, config.num_attention_heads)
        return "HunyuanVideo" if layers == (20, 40, 24) else None

    def grid(self, transformer: Any, call: dict[str, Any]) -> VideoGrid:
        frames, height, width = call["hidden_states"].shape[2:]
        patch, patch_t = transformer.config.patch_size, transformer.config.patch_size_t
        return VideoGrid(
            frames=frames // patch_t,
            height=height // patch,
            width=width // patch,
            text=call["encoder_hidden_states"].shape[1],
        )

    def frames_apart(self, transformer: Any) -> int:
        # Such blocks modulate the tokens of the given image by their index.
        return 1 if transformer.config.image_condition_type == "token_replace" else 0

    def order_hooks(self, transformer: Any, current: CurrentOrder) -> list[RemovableHandle]:
        return [
            order_output(transformer.x_embedder, current, 1, "the patch embedding"),
            order_output(transformer.rope, current, 0, "the rotary table"),
            undo_output(transformer.proj_out, current),
        ]

    def processor(self, original: Any, attention: SelfAttention, layer: int) -> Processor:
        return HunyuanVideoProcessor(original, attention, layer)


class HunyuanVideoProcessor(DispatchedProcessor):
    """Joint self-attention of the video and text tokens of a HunyuanVideo block of either kind."""

    # diffusers passes only the arguments it finds named in this signature.
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        # The model's own mask [B, 1, 1, L] says where each sample's padding starts.
        starts = attention_mask is not None and attention_mask.shape[1:3] == (1, 1)
        if not self.attention.runs_sparse(self, hidden_states, None if starts else attention_mask):
            dense: tuple[Tensor, Tensor] = self.original(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
            return dense
        kv_lengths = None if attention_mask is None else attention_mask[:, 0, 0].sum(dim=1)
        video = hidden_states.shape[1]
        dual = attn.add_q_proj is not None
        tokens = hidden_states if dual else cat((hidden_states, encoder_hidden_states), dim=1)
        query, key, value = _heads(attn, attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens))
        query, key = _normed(query, attn.norm_q), _normed(key, attn.norm_k)
        if image_rotary_emb is not None:
            query, key = (
                cat((apply_rotary_emb(x[:, :video], image_rotary_emb, sequence_dim=1), x[:, video:]), dim=1)
                for x in (query, key)
            )
        if dual:
            text = encoder_hidden_states
            added = _heads(attn, attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text))
            query = cat((query, _normed(added[0], attn.norm_added_q)), dim=1)
            key = cat((key, _normed(added[1], attn.norm_added_k)), dim=1)
            value = cat((value, added[2]), dim=1)
        out = self.attention.attend(
            self, query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), kv_lengths=kv_lengths
        )
        out = out.transpose(1, 2).flatten(2)
        out_video, out_text = out[:, :video], out[:, video:]
        # Single-stream blocks project both together after the attention.
        if getattr(attn, "to_out", None) is not None:
            out_video = attn.to_out[1](attn.to_out[0](out_video))
        if getattr(attn, "to_add_out", None) is not None:
            out_text = attn.to_add_out(out_text)
        return out_video, out_text


def _heads(attn: Any, *projected: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.unflatten(2, (attn.heads, -1)) for x in projected)  # [B, L, H, D]


def _normed(x: Tensor, norm: Any) -> Tensor:
    normed: Tensor = x if norm is None else norm(x)
    return normed
