"""What a preset file may hold, as frozen pydantic models; every level forbids unknown keys.

A file maps model names to `ModelPresets`. The JSON Schema that editors check files by comes from here too.
"""

from collections.abc import Mapping
from importlib import resources
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from .errors import Path

RULE_BROKEN = "preset_rule"
"""The pydantic error type of a rule over several values.

Its context lists `problems`: pairs of the path below the model and the message.
"""


class _Form(BaseModel):
    """What it dumps, in whatever way, can be validated again and is equal then."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with some fields changed, which are checked like those of a file; None leaves one out.

        Raises:
            pydantic.ValidationError: if they are not what they should be, or there is no such field.
        """
        copied = super().model_copy(deep=deep)
        if not update:
            return copied
        given = {name: getattr(copied, name) for name in copied.model_fields_set} | dict(update)
        return self.model_validate({_key(self, name): value for name, value in given.items() if value is not None})

    @model_serializer(mode="wrap")
    def _as_in_a_file(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {_key(self, name): value for name, value in plain(self).items() if value is not None}


def _key(form: BaseModel, name: str) -> str:
    """What a file calls the field of that name."""
    field = type(form).model_fields.get(name)
    return name if field is None or field.alias is None else field.alias


def _rule_broken(problems: list[tuple[Path, str]]) -> PydanticCustomError:
    text = "; ".join(message for _, message in problems)
    return PydanticCustomError(RULE_BROKEN, "{text}", {"text": text, "problems": problems})


def _given(value: object) -> object:
    if value is None:
        raise ValueError("a key without a value: leave the key out instead")
    return value


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _whole(value: object) -> object:
    if not isinstance(value, int):  # 64.0 is 64 to a Literal
        raise ValueError("not a whole number")
    return value


def _never_null(schema: dict[str, Any]) -> None:
    del schema["default"]
    schema.update(schema.pop("anyOf")[0])


PRESETS = resources.files("psa_config") / "presets"
"""The shipped files: one a model, named after it."""

LARGEST = 10**18 - 1
"""The largest whole number of a file: eighteen digits, which always fit 64 bits."""

BlockLength = Annotated[Literal[32, 64, 128], BeforeValidator(_whole)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Size = Annotated[int, Field(ge=1, le=LARGEST)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Cosine = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]
OptionalSize = Annotated[Size | None, BeforeValidator(_given), Field(json_schema_extra=_never_null)]
OptionalShare = Annotated[Share | None, BeforeValidator(_given), Field(json_schema_extra=_never_null)]
OptionalRange = Annotated[
    tuple[Share, Share] | None,
    BeforeValidator(_as_tuple),
    BeforeValidator(_given),
    Field(json_schema_extra=_never_null),
]


class VideoScale(_Form):
    """Pixels and frames to one token: the VAE's factor times the patch size, in each direction."""

    width_divisor: Size = Field(description="Pixels of width to one token.")
    height_divisor: Size = Field(description="Pixels of height to one token.")
    depth_divisor: Size = Field(description="Frames to one latent frame of tokens.")


class BlockSize(_Form):
    """Tokens that share one level decision. The smallest block, 32, still holds a row of every level."""

    m: BlockLength = Field(description="Tokens in a query block.")
    n: BlockLength = Field(description="Tokens in a key/value block.")
    tile_n: BlockLength = Field(
        default=32, description="Key/value rows a kernel loads at a time. A hint: kernels tune their own."
    )


class MaskRatios(_Form):
    """The range of each pyramid level, named by how many tokens one of its rows stands for.

    A range is `(low, high)` of cumulative importance (`thresholdbound`) or of the share of blocks (`topk`).
    Level by level, 1 2 4 8 0, each range starts where the one before it ended; 1 starts at 0, and 0, the
    skipped part, ends at 1. A level left out is empty; leaving out 0 skips the rest. Order does not matter.
    """

    full: OptionalRange = Field(default=None, alias="1", description="Blocks read as they are.")
    pooled_2: OptionalRange = Field(default=None, alias="2", description="Blocks read as means of 2 tokens.")
    pooled_4: OptionalRange = Field(default=None, alias="4", description="Blocks read as means of 4 tokens.")
    pooled_8: OptionalRange = Field(default=None, alias="8", description="Blocks read as means of 8 tokens.")
    skipped: OptionalRange = Field(default=None, alias="0", description="Blocks skipped; ends at 1.")

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """The upper ends of the ranges of 1, 2, 4 and 8; an empty range ends where the one before it does."""
        one = 0.0 if self.full is None else self.full[1]
        two = one if self.pooled_2 is None else self.pooled_2[1]
        four = two if self.pooled_4 is None else self.pooled_4[1]
        eight = four if self.pooled_8 is None else self.pooled_8[1]
        return one, two, four, eight

    @model_validator(mode="after")
    def _contiguous(self) -> "MaskRatios":
        problems: list[tuple[Path, str]] = []
        end = 0.0
        for key, span in (
            ("1", self.full),
            ("2", self.pooled_2),
            ("4", self.pooled_4),
            ("8", self.pooled_8),
            ("0", self.skipped),
        ):
            if span is None:
                continue
            low, high = span
            if low > high:
                problems.append(((key,), f"runs backwards from {low} to {high}, expected [{high}, {low}]"))
            elif low != end:
                fault = "leaves a gap after" if low > end else "overlaps what ends at"
                problems.append(((key, 0), f"{low} {fault} {end}, expected {end}"))
            end = max(low, high)
        if self.skipped is not None and self.skipped[1] != 1:
            problems.append((("0", 1), f"got {self.skipped[1]}, expected the skipped range to end at 1.0"))
        if self.bounds[-1] == 0:
            problems.append(((), "every range above 0 is empty, expected blocks at level 1, 2, 4 or 8"))
        if problems:
            raise _rule_broken(problems)
        return self


OptionalRatios = Annotated[MaskRatios | None, BeforeValidator(_given), Field(json_schema_extra=_never_null)]


class SimThresholds(_Form):
    """How alike neighbouring keys of a block must be, in mean cosine similarity, for it to be pooled so far.

    -1 always allows a level, 1 never does.
    """

    x2: Cosine = Field(default=0.7, description="For means of 2 tokens.")
    x4: Cosine = Field(default=0.65, description="For means of 4 tokens.")
    x8: Cosine = Field(default=0.6, description="For means of 8 tokens.")

    @property
    def values(self) -> tuple[float, float, float]:
        """The thresholds of levels 2, 3 and 4."""
        return self.x2, self.x4, self.x8


class Samples(_Form):
    """How many tokens of a block stand for it when importance is estimated; None is a quarter of it.

    With antidiagonal importance, how many groups of consecutive tokens a block is cut into.
    """

    q: OptionalSize = Field(default=None, description="Sampled query tokens of a block.")
    kv: OptionalSize = Field(default=None, description="Sampled key tokens of a block.")


class DenseAttention(_Form):
    """Full attention, unchanged."""

    type: Literal["dense"]
    description: str = Field(default="", description="For people; nothing reads it.")


def _add_other_spelling(schema: dict[str, Any]) -> None:
    properties = schema["properties"]
    properties["min_full_attn_ratio"] = {**properties["min_full"], "description": "The same as min_full."}


class PyramidSparseAttention(_Form):
    """Pyramid Sparse Attention and all of its settings."""

    model_config = ConfigDict(json_schema_extra=_add_other_spelling)

    type: Literal["psa"]
    description: str = Field(default="", description="For people; nothing reads it.")
    use_rearrange: bool = Field(description="Whether tokens are put in the order of rearrange_method.")
    block_size: BlockSize = Field(description="Tokens that share one level decision.")
    mask_ratios: OptionalRatios = Field(
        default=None, description="The range of each level: 1, 2, 4, 8, and 0 for skipped. Not with budget."
    )
    mask_mode: Literal["thresholdbound", "topk", "budget"] = Field(
        description="Ranges of cumulative importance (thresholdbound) or of the number of blocks (topk), "
        "or levels that spend a density where it helps most (budget)."
    )
    density: OptionalShare = Field(
        default=None, description="With budget: executed over dense work, means of skipped blocks included."
    )
    budget_per: Literal["head", "layer"] = Field(
        default="head", description="With budget: each head spends the density, or the heads of a layer share it."
    )
    warmup_steps: Count = Field(default=0, description="Dense denoising steps at the start.")
    cooldown_steps: Count = Field(default=0, description="Dense denoising steps at the end.")
    dense_layers: Annotated[tuple[Count, ...], BeforeValidator(_as_tuple)] = Field(
        default=(), description="Layers that stay dense, from 0."
    )
    rearrange_method: Literal["Gilbert", "Cube", "Semantic", "Hybrid", "KdTree"] = Field(
        default="Gilbert",
        description="Along a Hilbert-like curve (Gilbert), by cubes of tile_size (Cube), by k-means of queries and of "
        "keys in every layer (Semantic), queries along the curve and keys by k-means (Hybrid), or both along the curve "
        "and keys, inside each block, by a k-d tree, so that like is pooled with like (KdTree).",
    )
    tile_size: Annotated[tuple[Size, Size, Size], BeforeValidator(_as_tuple)] = Field(
        default=(2, 8, 8), description="Frames, rows and columns of tokens in a cube."
    )
    cubes_along: Literal["Raster", "Gilbert"] = Field(
        default="Raster", description="How cubes follow one another: row by row, or along the Hilbert-like curve."
    )
    num_clusters: Size = Field(default=64, description="Clusters of a head's tokens, with Semantic and Hybrid.")
    cluster_iterations: Size = Field(
        default=2, description="Iterations of k-means a step, from the clusters of the step before."
    )
    use_sim_mask: bool = Field(default=False, description="Whether sim_thresholds cap the levels.")
    sim_thresholds: SimThresholds = Field(default=SimThresholds(), description="Similarity a block needs to be pooled.")
    min_full: Share = Field(
        default=0.0,
        validation_alias=AliasChoices("min_full", "min_full_attn_ratio"),
        description="Least share of the blocks of a row read as they are.",
    )
    skip: Literal["drop", "mean"] = Field(
        default="drop", description="What becomes of skipped blocks: nothing, or one row, their mean."
    )
    importance_method: Literal["sampled", "antidiagonal"] = Field(
        default="sampled", description="Importance from tokens drawn from each block, or from sums of antidiagonals."
    )
    importance_reduction: Literal["max", "mean", "error"] = Field(
        default="max",
        description="A block pair's largest weight, its mean weight, or how wrong the block's mean is (sampled only).",
    )
    samples: Samples = Field(default_factory=Samples, description="Tokens sampled from a block for its importance.")
    seed: Count = Field(default=0, description="Seed of the sampling.")

    @model_serializer(mode="wrap")
    def _as_in_a_file(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values = super()._as_in_a_file(plain)
        if self.mask_mode != "budget":
            values.pop("budget_per", None)  # its default too is refused without a budget
        return values

    @field_validator("samples")
    @classmethod
    def _within_block(cls, samples: Samples, info: ValidationInfo) -> Samples:
        block = info.data.get("block_size")
        if block is None:
            return samples
        sampled = (("q", samples.q, "m", block.m), ("kv", samples.kv, "n", block.n))
        problems: list[tuple[Path, str]] = [
            ((key,), f"got {count}, expected at most block_size.{side}, which is {size}")
            for key, count, side, size in sampled
            if count is not None and count > size
        ]
        if not problems and info.data.get("importance_method") == "antidiagonal":
            problems = cls._uneven_groups(samples, block)
        if problems:
            raise _rule_broken(problems)
        return samples

    @model_validator(mode="after")
    def _mode_has_what_it_needs(self) -> "PyramidSparseAttention":
        problems = self._budget_problems() if self.mask_mode == "budget" else self._range_problems()
        if self.importance_reduction == "error" and self.importance_method == "antidiagonal":
            message = 'got "error", expected "max" or "mean" with importance_method antidiagonal'
            problems.append((("importance_reduction",), message))
        if problems:
            raise _rule_broken(problems)
        return self

    def _range_problems(self) -> list[tuple[Path, str]]:
        """What a mode by ranges lacks, or has too much."""
        problems: list[tuple[Path, str]] = []
        if self.mask_ratios is None:
            problems.append((("mask_ratios",), f"missing, expected a mapping with mask_mode {self.mask_mode}"))
        message = f"given with mask_mode {self.mask_mode}, expected it with budget alone"
        return problems + [((key,), message) for key in ("density", "budget_per") if key in self.model_fields_set]

    def _budget_problems(self) -> list[tuple[Path, str]]:
        """What the budget lacks, or has too much."""
        problems: list[tuple[Path, str]] = []
        least = 1 / self.block_size.n if self.skip == "mean" else 0.0
        if self.density is None:
            problems.append((("density",), "missing, expected a number from 0 to 1 with mask_mode budget"))
        elif self.density <= least:
            why = ", what the means of all blocks cost" if least else ""
            problems.append((("density",), f"got {self.density}, expected more than {least:g}{why}"))
        if self.mask_ratios is not None:
            problems.append((("mask_ratios",), "given with mask_mode budget, expected density alone"))
        if self.use_sim_mask:
            message = "got true, expected false with mask_mode budget, which the finer levels would exceed"
            problems.append((("use_sim_mask",), message))
        return problems

    @staticmethod
    def _uneven_groups(samples: Samples, block: BlockSize) -> list[tuple[Path, str]]:
        """What keeps antidiagonals from pairing groups of as many queries as keys."""
        counts = {"q": samples.q or block.m // 4, "kv": samples.kv or block.n // 4}
        problems: list[tuple[Path, str]] = [
            ((key,), f"got {counts[key]}, expected a divisor of block_size.{side}, which is {size}, for antidiagonals")
            for key, side, size in (("q", "m", block.m), ("kv", "n", block.n))
            if size % counts[key]
        ]
        groups = {"q": block.m // counts["q"], "kv": block.n // counts["kv"]}
        if not problems and groups["q"] != groups["kv"]:
            key, other = ("q", "kv") if samples.kv is None else ("kv", "q")  # one that the file gives
            message = f"{counts[key]} makes groups of {groups[key]} tokens, expected {groups[other]} as samples.{other}"
            problems.append(((key,), f"{message} does, for antidiagonals"))
        return problems


Attention = Annotated[DenseAttention | PyramidSparseAttention, Field(discriminator="type")]


def _only_presets_required(schema: dict[str, Any]) -> None:
    schema["required"] = ["attention_configs"]


class ModelPresets(_Form):
    """One model of a file: its geometry and its presets."""

    # What a file may leave out depends on the model's name, and is filled in before a value comes here.
    model_config = ConfigDict(json_schema_extra=_only_presets_required)

    default_attention: str = Field(description="The preset used where none is named.")
    video_scale: VideoScale = Field(description="Pixels and frames to one token.")
    text_length: Count = Field(description="Text tokens in the sequence that attention sees.")
    attention_configs: dict[str, Attention] = Field(min_length=1, description="The presets, by name.")


class Preset(_Form):
    """One preset of one model, all that is needed to run it."""

    model: str
    name: str
    text_length: Count
    video_scale: VideoScale
    attention: Attention


PRESET_FILE: TypeAdapter[dict[str, ModelPresets]] = TypeAdapter(
    Annotated[dict[str, ModelPresets], Field(min_length=1, description="Attention presets, by model.")]
)


def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a preset file."""
    schema = PRESET_FILE.json_schema()
    model = schema["additionalProperties"]
    shipped = sorted(file.name.removesuffix(".yaml") for file in PRESETS.iterdir())
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Pyramid Sparse Attention presets",
        **schema,
        "properties": dict.fromkeys(shipped, model),
        "additionalProperties": {**model, "required": ["video_scale", "text_length"]},
    }
