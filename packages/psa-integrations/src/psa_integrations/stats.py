"""What was executed: density per transformer, step and layer."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch

from psa_kernels import checks

Key = tuple[str, int | None, int]


@dataclass(frozen=True)
class LayerStats:
    """The calls of one layer in one denoising step.

    `step` is None where the step of the calls was unknown. `density` is the mean over calls, batch and heads
    of executed work / dense work, 1.0 for a dense call. `dense_calls` of the `calls` ran dense.
    """

    transformer: str
    step: int | None
    layer: int
    density: float
    calls: int
    dense_calls: int


@dataclass(frozen=True)
class AttentionStats:
    """Everything executed since the integration was applied, or since the last `reset_stats()`."""

    layers: tuple[LayerStats, ...]
    transformers: tuple[str, ...] = ()
    """The names of the transformers that are counted, those without a call too."""

    @property
    def calls(self) -> int:
        """Number of self-attention calls."""
        return sum(entry.calls for entry in self.layers)

    @property
    def density(self) -> float:
        """Mean density over all calls, in [0, 1]; 1.0 before the first call."""
        return _mean(self.layers)

    @property
    def sparsity(self) -> float:
        """1 - density."""
        return 1.0 - self.density

    def density_per_step(self, transformer: str = "transformer") -> dict[int | None, float]:
        """Mean density of each step of one transformer; a ValueError where no transformer has that name."""
        return _grouped(self._of(transformer), "step")

    def density_per_layer(self, transformer: str = "transformer") -> dict[int | None, float]:
        """Mean density of each layer of one transformer; a ValueError where no transformer has that name."""
        return _grouped(self._of(transformer), "layer")

    def dense_steps(self, transformer: str = "transformer") -> list[int | None]:
        """The steps of one transformer in which every call of every layer ran dense."""
        entries = self._of(transformer)
        sparse = {entry.step for entry in entries if entry.dense_calls < entry.calls}
        return list(dict.fromkeys(entry.step for entry in entries if entry.step not in sparse))

    def dense_layers(self, transformer: str = "transformer") -> list[int]:
        """The layers of one transformer that ran dense in every call."""
        entries = self._of(transformer)
        sparse = {entry.layer for entry in entries if entry.dense_calls < entry.calls}
        return sorted({entry.layer for entry in entries} - sparse)

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON: `density`, `sparsity`, `calls` and the list `layers`."""
        return {
            "density": self.density,
            "sparsity": self.sparsity,
            "calls": self.calls,
            "layers": [asdict(entry) for entry in self.layers],
        }

    def _of(self, transformer: str) -> list[LayerStats]:
        known = dict.fromkeys((*self.transformers, *(entry.transformer for entry in self.layers)))
        if known:
            checks.choice("transformer", transformer, list(known))
        return [entry for entry in self.layers if entry.transformer == transformer]


class StatsRecorder:
    """Adds up densities on the device they are on; only `read` brings them to the host.

    `transformers` are the names of those whose calls will be counted.
    """

    def __init__(self, transformers: tuple[str, ...] = ()) -> None:
        self._transformers = transformers
        self._sparse: dict[Key, torch.Tensor] = {}
        self._calls: dict[Key, int] = {}
        self._dense_calls: dict[Key, int] = {}

    def dense(self, key: Key) -> None:
        """Counts one dense call."""
        self._calls[key] = self._calls.get(key, 0) + 1
        self._dense_calls[key] = self._dense_calls.get(key, 0) + 1

    def sparse(self, key: Key, density: torch.Tensor) -> None:
        """Counts one sparse call of `density` [B, H]."""
        self._calls[key] = self._calls.get(key, 0) + 1
        mean = density.detach().mean(dtype=torch.float64)
        before = self._sparse.get(key)
        self._sparse[key] = mean if before is None else before.to(mean.device) + mean

    def read(self) -> AttentionStats:
        """The totals so far; waits for the device once."""
        sums = dict(zip(self._sparse, _to_host(self._sparse.values()), strict=True))
        return AttentionStats(
            tuple(
                LayerStats(
                    transformer=key[0],
                    step=key[1],
                    layer=key[2],
                    density=(sums.get(key, 0.0) + self._dense_calls.get(key, 0)) / calls,
                    calls=calls,
                    dense_calls=self._dense_calls.get(key, 0),
                )
                for key, calls in self._calls.items()
            ),
            self._transformers,
        )

    def reset(self) -> None:
        """Forgets everything recorded."""
        self._sparse.clear()
        self._calls.clear()
        self._dense_calls.clear()


def _to_host(values: Iterable[torch.Tensor]) -> list[float]:
    tensors = list(values)
    if not tensors:
        return []
    device = tensors[0].device
    return [float(x) for x in torch.stack([t.to(device) for t in tensors]).tolist()]


def _mean(entries: Iterable[LayerStats]) -> float:
    listed = list(entries)
    calls = sum(entry.calls for entry in listed)
    return sum(entry.density * entry.calls for entry in listed) / calls if calls else 1.0


def _grouped(entries: Iterable[LayerStats], field: str) -> dict[int | None, float]:
    groups: dict[int | None, list[LayerStats]] = {}
    for entry in entries:
        groups.setdefault(getattr(entry, field), []).append(entry)
    return {value: _mean(group) for value, group in groups.items()}
