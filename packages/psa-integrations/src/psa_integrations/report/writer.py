"""From runs to `metrics.json` and `report.html`, one run at a time."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from psa_integrations.recording import LevelMap
from psa_integrations.report.metrics import video_metrics
from psa_integrations.report.page import render_page
from psa_integrations.report.pictures import EXACT_BYTES, encode_frames, frame_size, pack
from psa_integrations.stats import AttentionStats
from psa_masks import TokenOrder, VideoGrid
from psa_masks.plot import LEVEL_COLOURS, LEVEL_COLOURS_DARK


@dataclass(frozen=True)
class ReportRun:
    """One video and how it was made.

    `name` is its preset's, `description` what the preset says of itself, `file` the video's path from the folder
    of the report. `maps_left_out` level maps were not kept for want of room.
    """

    name: str
    description: str
    file: str
    video: np.ndarray
    seconds: float
    step_seconds: tuple[float, ...]
    stats: AttentionStats
    maps: tuple[LevelMap, ...] = ()
    maps_left_out: int = 0


@dataclass
class _Prompt:
    """A prompt with, of each run in turn, its entry in `metrics.json` and what the page shows of it."""

    prompt: str
    numbers: list[dict[str, object]] = field(default_factory=list)
    shown: list[dict[str, object]] = field(default_factory=list)


class ReportWriter:
    """Takes prompts and their runs, keeps what the page shows of them, and writes it.

    Of the videos only the dense one of the prompt under way is held.

    Args:
        about: what is the same for all runs (model, seed, size ...), plain values for JSON; `fps` is the rate at
            which videos play.
        num_videos: how many there will be, for whether their frames can be on the page as they are, and how many
            are missing from it in the end.
    """

    def __init__(self, about: Mapping[str, object], *, num_videos: int) -> None:
        self._about = dict(about)
        self._num_videos = num_videos
        self._prompts: list[_Prompt] = []
        self._orders: list[dict[str, object]] = []
        self._order_places: dict[tuple[VideoGrid, int], int] = {}
        self._kept_orders: list[TokenOrder] = []
        self._dense: np.ndarray | None = None
        self._pictures: dict[str, object] = {}

    def start_prompt(self, prompt: str) -> None:
        """The runs from now on are of this prompt; the first of them is the dense one."""
        self._dense = None
        self._prompts.append(_Prompt(prompt))

    def add(self, run: ReportRun) -> Mapping[str, object]:
        """Measures a run against the dense one of its prompt.

        Returns:
            Its entry in `metrics.json`.

        Raises:
            ValueError: see `video_metrics`.
        """
        dense = self._dense is None
        reference = run.video if self._dense is None else self._dense
        numbers: dict[str, object] = {
            "name": run.name,
            "dense": dense,
            "description": run.description,
            "video": run.file,
            "seconds": run.seconds,
            "step_seconds": list(run.step_seconds),
            **video_metrics(run.video, reference),
            **run.stats.to_dict(),
        }
        if not self._pictures:
            exact = run.video.nbytes // run.video.itemsize * self._num_videos <= EXACT_BYTES
            width, height = frame_size(run.video.shape[2], run.video.shape[1], exact=exact)
            self._pictures = {"width": width, "height": height, "exact": exact}
        self._prompts[-1].shown.append(
            {
                "frames": encode_frames(run.video, exact=bool(self._pictures["exact"])),
                "maps": [self._map(level_map) for level_map in run.maps],
                "maps_left_out": run.maps_left_out,
            }
        )
        self._prompts[-1].numbers.append(numbers)
        if dense:
            self._dense = run.video
        return numbers

    def finish_early(self) -> list[str]:
        """Leaves out what has nothing to be compared with, after a run that was cut short.

        Returns:
            The files of the videos that stay, none where there is nothing to show.
        """
        for entry in self._prompts:
            del entry.shown[len(entry.numbers) :]  # of a run that was cut short between the two
        self._prompts = [entry for entry in self._prompts if len(entry.numbers) > 1]
        return [str(run["video"]) for entry in self._prompts for run in entry.numbers]

    def metrics(self) -> dict[str, object]:
        """The content of `metrics.json`."""
        prompts = [{"prompt": entry.prompt, "runs": entry.numbers} for entry in self._prompts]
        missing = self._num_videos - sum(len(entry.numbers) for entry in self._prompts)
        return {"format": 1, **self._about, "missing_videos": missing, "prompts": prompts}

    def page_data(self) -> dict[str, object]:
        """The content of the page: the metrics, frames and level maps."""
        return {
            **self.metrics(),
            "shown": [entry.shown for entry in self._prompts],
            "pictures": self._pictures,
            "orders": self._orders,
            "palette": {"light": LEVEL_COLOURS, "dark": LEVEL_COLOURS_DARK},
        }

    def write(self, folder: Path) -> None:
        """Writes `metrics.json` and `report.html` into `folder`."""
        text = json.dumps(self.metrics(), indent=1, allow_nan=False, ensure_ascii=False)
        (folder / "metrics.json").write_text(text + "\n", encoding="utf-8")
        prompts = [entry.prompt for entry in self._prompts]
        more = f" and {len(prompts) - 1} more" if len(prompts) > 1 else ""
        title = f"{prompts[0]}{more} · {self._about.get('model', 'comparison')}"
        (folder / "report.html").write_text(render_page(self.page_data(), title=title), encoding="utf-8")

    def _map(self, level_map: LevelMap) -> dict[str, object]:
        _, num_q_blocks, num_kv_blocks = level_map.levels.shape
        names = ("transformer", "step", "layer", "block_q", "block_kv", "num_levels")
        return {name: getattr(level_map, name) for name in names} | {
            "heads": list(level_map.heads),
            "num_q_blocks": num_q_blocks,
            "num_kv_blocks": num_kv_blocks,
            "order": self._order(level_map.grid, level_map.order),
            "levels": pack(level_map.levels.numpy()),
        }

    def _order(self, grid: VideoGrid, order: TokenOrder | None) -> int:
        """Index of a token order in the page; most maps share one."""
        key = (grid, id(order))
        if key not in self._order_places:
            places = np.arange(grid.video_len) if order is None else order.inverse.numpy()
            self._order_places[key] = len(self._orders)
            if order is not None:
                self._kept_orders.append(order)  # its id must stay its own
            self._orders.append(
                {
                    "frames": grid.frames,
                    "height": grid.height,
                    "width": grid.width,
                    "seq_len": grid.seq_len,
                    # Where in the sequence each video token stands, frame by frame, row by row.
                    "places": pack((places + grid.video_range[0]).astype("<u4")),
                }
            )
        return self._order_places[key]
