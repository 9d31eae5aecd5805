"""The two networks of the tiny model and their size."""

# diffusers ships no type information, so its base classes are Any to the type checker.
# mypy: disallow-subclassing-any=False, disallow-untyped-decorators=False

from typing import Any

import torch
from diffusers import ModelMixin, WanTransformer3DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config

from psa_integrations.tiny_wan.captions import VOCABULARY, direction_vectors

TEXT_DIM = 64
PATCH = 4

# About 6.2 M parameters: 12.3 MB in half precision.
TRANSFORMER_CONFIG: dict[str, Any] = {
    "patch_size": (1, PATCH, PATCH),
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "in_channels": 4,
    "out_channels": 3,
    "text_dim": TEXT_DIM,
    "freq_dim": 128,
    "ffn_dim": 768,
    "num_layers": 6,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 128,
}


def with_motion(video: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Appends a channel that shows which way the caption's shape goes.

    Rotary embeddings tell tokens their distances only: in pure noise nothing shows which frame is the first or
    which side is left, and the direction that a caption asks for could not be begun. The channel is the product
    of the time and of the place along the caption's direction, so it is high where the shape has yet to get to
    and where it has been, at the right times.

    Args:
        video: [B, 3, F, H, W].
        ids: the captions' vocabulary indices, int64 [B, 4].

    Returns:
        [B, 4, F, H, W]; time and place run from -1 to 1 over the video, and a caption that names no direction
        gets 0.
    """
    axes = [torch.linspace(-1, 1, n, device=video.device, dtype=video.dtype) for n in video.shape[2:]]
    time, y, x = torch.meshgrid(*axes, indexing="ij")
    right, down = direction_vectors(ids).to(video.dtype).T[:, :, None, None, None]
    return torch.cat([video, (time * (right * x + down * y))[:, None]], dim=1)


class CaptionEncoder(ModelMixin, ConfigMixin):
    """A learned vector for each word of the vocabulary: int64 [B, S] -> [B, S, dim]."""

    @register_to_config
    def __init__(self, vocabulary: int = len(VOCABULARY), dim: int = TEXT_DIM) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocabulary, dim)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.embedding(ids)
        return embedded


def build_transformer(**overrides: Any) -> WanTransformer3DModel:
    """A transformer of the shipped size, untrained; keyword arguments replace single fields of its config."""
    return WanTransformer3DModel(**{**TRANSFORMER_CONFIG, **overrides})
