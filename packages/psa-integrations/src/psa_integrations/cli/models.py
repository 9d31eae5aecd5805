"""The models the command knows, their weights and their run defaults."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class RunDefaults:
    """Size in pixels and frames, and how to sample."""

    width: int
    height: int
    frames: int
    steps: int
    guidance: float
    fps: int


@dataclass(frozen=True)
class ModelSpec:
    """One model.

    `presets` is its name in psa_config, `hub` the repository of its weights (None: they ship with the package),
    `few_steps` the steps and guidance of presets made for a distilled model.
    """

    name: str
    presets: str
    hub: str | None
    defaults: RunDefaults
    few_steps: Mapping[str, tuple[int, float]] = field(default_factory=dict)

    def defaults_of(self, preset: str) -> RunDefaults:
        """The run defaults under the preset of that name."""
        if preset not in self.few_steps:
            return self.defaults
        steps, guidance = self.few_steps[preset]
        return replace(self.defaults, steps=steps, guidance=guidance)


MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec("tiny-wan", "tiny-wan", None, RunDefaults(64, 64, 16, 25, 3.0, 8)),
        ModelSpec(
            "wan2.1-1.3b",
            "Wan2.1_1.3b",
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            RunDefaults(1280, 720, 69, 50, 5.0, 16),
        ),
        ModelSpec(
            "wan2.1-14b",
            "Wan2.1_14b",
            "Wan-AI/Wan2.1-T2V-14B-Diffusers",
            RunDefaults(1280, 720, 69, 50, 5.0, 16),
        ),
        ModelSpec(
            "wan2.2-a14b",
            "Wan2.2_A14B",
            "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
            RunDefaults(1280, 768, 69, 40, 4.0, 16),
        ),
        ModelSpec(
            "wan2.2-5b",
            "Wan2.2_5B",
            "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
            RunDefaults(1280, 704, 121, 50, 5.0, 24),
        ),
        ModelSpec(
            "cogvideox-5b",
            "CogVideo_5b",
            "zai-org/CogVideoX-5b",
            RunDefaults(720, 480, 49, 50, 6.0, 8),
            few_steps={"psa_4steps": (4, 1.0)},
        ),
        ModelSpec(
            "cogvideox1.5-5b",
            "CogVideo1.5_5b",
            "zai-org/CogVideoX1.5-5B",
            RunDefaults(1360, 768, 81, 50, 6.0, 16),
        ),
        # Its guidance is a number given to the model, not a second prediction.
        ModelSpec(
            "hunyuanvideo",
            "HunyuanVideo",
            "hunyuanvideo-community/HunyuanVideo",
            RunDefaults(1280, 720, 129, 50, 6.0, 24),
        ),
        ModelSpec(
            "ltx-video",
            "LTX-Video",
            "Lightricks/LTX-Video",
            RunDefaults(704, 480, 161, 50, 3.0, 25),
        ),
        ModelSpec(
            "mochi",
            "Mochi",
            "genmo/mochi-1-preview",
            RunDefaults(848, 480, 85, 64, 4.5, 30),
        ),
    )
}


def command_name(name: str) -> str:
    """The name in MODELS of the model that psa_config calls `name`; any other name as it is."""
    return next((spec.name for spec in MODELS.values() if spec.presets == name), name)


def presets_name(name: str) -> str:
    """The name in psa_config of the model that the commands call `name`; any other name as it is."""
    return MODELS[name].presets if name in MODELS else name
