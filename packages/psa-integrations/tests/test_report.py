"""What the report says and how it is packed: numbers, escaping, pictures, token orders."""

import base64
import io
import json
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from psa_integrations.cli.video import psnr_and_ssim
from psa_integrations.recording import LevelMap
from psa_integrations.report import ReportRun, ReportWriter, render_page, video_metrics
from psa_integrations.report.page import json_for_script
from psa_integrations.report.pictures import encode_frames, frame_size, pack
from psa_integrations.stats import AttentionStats, LayerStats
from psa_masks import VideoGrid, gilbert_order

NASTY = '</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> & "$data" $style \u2028 \\ \x00 ü'


def videos(count: int = 2, size: tuple[int, int, int] = (3, 16, 20)) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.random((*size, 3), dtype=np.float32) for _ in range(count)]


class Parsed(HTMLParser):
    """The elements of a page with their attributes, and the text of each script, title and style."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag
        if tag in ("script", "title", "style"):
            self.texts.append((tag, ""))

    def handle_data(self, data: str) -> None:
        if self.texts and self._open == self.texts[-1][0]:
            self.texts[-1] = (self._open, self.texts[-1][1] + data)

    def handle_endtag(self, tag: str) -> None:
        self._open = ""


def test_metrics_agree_with_those_of_whole_videos() -> None:
    ours, theirs = videos()
    numbers: Any = video_metrics(ours, theirs)
    assert (numbers["psnr"], numbers["ssim"]) == pytest.approx(psnr_and_ssim(ours, theirs), rel=1e-5)
    for frame in range(3):
        alone = psnr_and_ssim(ours[frame : frame + 1], theirs[frame : frame + 1])
        assert (numbers["psnr_per_frame"][frame], numbers["ssim_per_frame"][frame]) == pytest.approx(alone, rel=1e-5)


def test_an_equal_frame_has_no_psnr() -> None:
    ours, theirs = videos()
    ours[1] = theirs[1]
    numbers: Any = video_metrics(ours, theirs)
    assert [value is None for value in numbers["psnr_per_frame"]] == [False, True, False]
    assert numbers["ssim_per_frame"][1] == pytest.approx(1.0)
    assert numbers["psnr"] is not None
    assert video_metrics(theirs, theirs)["psnr"] is None


def test_videos_that_cannot_be_compared_are_refused() -> None:
    ours, theirs = videos()
    with pytest.raises(ValueError, match=r"shape of the reference, \(2, 16, 20, 3\), got \(3, 16, 20, 3\)"):
        video_metrics(ours, theirs[:2])
    ours[0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="must hold finite numbers"):
        video_metrics(ours, theirs)


def test_no_text_ends_the_script_it_stands_in() -> None:
    text = json_for_script({NASTY: [NASTY]})
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == {NASTY: [NASTY]}


def test_json_has_no_word_for_nan() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_for_script({"psnr": float("nan")})


def test_a_nasty_prompt_stays_a_text() -> None:
    plain, nasty = (Parsed(render_page({"prompt": text}, title=text)) for text in ("a cat", NASTY))
    assert [tag for tag, _ in nasty.elements] == [tag for tag, _ in plain.elements]
    assert dict(nasty.texts)["title"].replace("\ufffd", "\x00") == NASTY
    (data, _script) = (text for tag, text in nasty.texts if tag == "script")
    assert json.loads(data) == {"prompt": NASTY}
    assert dict(nasty.texts)["style"] == dict(plain.texts)["style"]


def test_the_page_asks_for_nothing_beyond_itself() -> None:
    page = Parsed(render_page({}, title=""))
    assert not [tag for tag, found in page.elements if {"src", "href", "srcset", "action"} & set(found)]
    assert not {"link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.elements}
    assert not [text for tag, text in page.texts if tag == "style" and ("url(" in text or "@import" in text)]
    (policy,) = (found["content"] for _, found in page.elements if found.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_lossless_frames_are_the_videos_pixels() -> None:
    (video,) = videos(1)
    for frame, uri in zip(video, encode_frames(video, exact=True), strict=True):
        kind, _, content = uri.partition(",")
        assert kind == "data:image/png;base64"
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))
        assert np.array_equal(pixels, (frame * 255).round().astype(np.uint8))


def test_frames_of_large_videos_are_smaller() -> None:
    assert frame_size(1280, 720, exact=True) == (1280, 720)
    assert frame_size(1280, 720, exact=False) == (480, 270)
    assert frame_size(720, 1280, exact=False) == (270, 480)
    assert frame_size(64, 48, exact=False) == (64, 48)
    assert frame_size(4000, 1, exact=False) == (480, 1)
    (uri,) = encode_frames(np.zeros((1, 32, 960, 3)), exact=False)
    kind, _, content = uri.partition(",")
    assert kind == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == (480, 16)


def unpack(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype)


def test_packed_arrays_come_back() -> None:
    array = np.arange(12, dtype="<u4").reshape(3, 4)[:, ::2]
    assert np.array_equal(unpack(pack(array), "<u4").reshape(3, 2), array)


def level_map(grid: VideoGrid, order: Any, seed: int = 0) -> LevelMap:
    blocks = -(-grid.seq_len // 16)
    levels = torch.randint(0, 5, (2, blocks, blocks), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    return LevelMap("transformer", 1, 0, (0, 3), levels, grid, order, 16, 16, 4)


def run_of(video: np.ndarray, name: str = "psa", **more: Any) -> ReportRun:
    stats = AttentionStats((LayerStats("transformer", 1, 0, 0.5, 2, 0),))
    return ReportRun(name, "", f"{name}.mp4", video, 2.0, (1.0, 1.0), stats, **more)


def test_level_maps_and_orders_are_kept_as_they_are() -> None:
    grid = VideoGrid(frames=3, height=4, width=5, text=7, text_first=True)
    order = gilbert_order(VideoGrid(frames=3, height=4, width=5))
    maps = (level_map(grid, order, 1), level_map(grid, order, 2), level_map(grid, None, 3))
    writer = ReportWriter({"model": "m"}, num_videos=2)
    writer.start_prompt("a prompt")
    dense, sparse = videos()
    writer.add(run_of(dense, "dense"))
    writer.add(run_of(sparse, maps=maps, maps_left_out=4))
    data: Any = writer.page_data()
    shown = data["shown"][0][1]
    assert shown["maps_left_out"] == 4
    assert [one["order"] for one in shown["maps"]] == [0, 0, 1]
    for one, kept in zip(shown["maps"], maps, strict=True):
        size = (2, one["num_q_blocks"], one["num_kv_blocks"])
        assert np.array_equal(unpack(one["levels"], "i1").reshape(size), kept.levels.numpy())
        assert (one["heads"], one["block_q"], one["block_kv"]) == ([0, 3], 16, 16)
    # Token i of the sequence, behind the text, is video token order[i].
    first, second = (unpack(one["places"], "<u4") for one in data["orders"])
    for place, token in enumerate(order.order.tolist()):
        assert first[token] == 7 + place
    assert second.tolist() == list(range(7, 67))
    assert data["orders"][0]["seq_len"] == 67


def test_each_prompt_has_its_own_dense_video(tmp_path: Path) -> None:
    first, second, other = videos(3)
    writer = ReportWriter({"model": "m"}, num_videos=4)
    for prompt, dense in (("one", first), (NASTY, second)):
        writer.start_prompt(prompt)
        writer.add(run_of(dense, "dense"))
        writer.add(run_of(other))
    writer.write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "report.html"]
    written = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert written == writer.metrics()
    assert [entry["prompt"] for entry in written["prompts"]] == ["one", NASTY]
    for entry, dense in zip(written["prompts"], (first, second), strict=True):
        reference, sparse = entry["runs"]
        assert (reference["dense"], reference["psnr"], sparse["dense"]) == (True, None, False)
        assert sparse["ssim_per_frame"] == video_metrics(other, dense)["ssim_per_frame"]
        assert sparse["layers"][0] == {
            "transformer": "transformer", "step": 1, "layer": 0, "density": 0.5, "calls": 2, "dense_calls": 0,
        }  # fmt: skip
