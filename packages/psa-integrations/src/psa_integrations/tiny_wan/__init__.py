"""A text-to-video model small enough to ship: one coloured shape moving over a textured background."""

from psa_integrations.tiny_wan.captions import Caption, parse_caption
from psa_integrations.tiny_wan.pipeline import TinyWanPipeline, build_random_pipeline, load_pipeline

__all__ = ["Caption", "TinyWanPipeline", "build_random_pipeline", "load_pipeline", "parse_caption"]
