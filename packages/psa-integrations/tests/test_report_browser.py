"""The report in a real browser: headless Chromium, driven by its DevTools protocol over a pair of pipes."""

import base64
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from psa_integrations.recording import LevelMap
from psa_integrations.report import ReportRun, ReportWriter
from psa_integrations.stats import AttentionStats, LayerStats
from psa_masks import TokenOrder, VideoGrid, gilbert_order
from psa_masks.plot import LEVEL_COLOURS, LEVEL_COLOURS_DARK

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)
# Chromium reads commands from descriptor 3 and answers on 4; the two given are first moved out of the way of these.
LAUNCH = """
import fcntl, os, sys
commands, answers = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(commands, 3)
os.dup2(answers, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
NASTY = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">&amp;"
FRAMES, HEIGHT, WIDTH = 4, 24, 40
BLOCK = 16
# In patches of 4 pixels, with text before them.
GRID = VideoGrid(frames=FRAMES, height=HEIGHT // 4, width=WIDTH // 4, text=20, text_first=True)
ORDER = gilbert_order(VideoGrid(frames=FRAMES, height=HEIGHT // 4, width=WIDTH // 4))


class Browser:
    """A browser with one page."""

    def __init__(self, profile: Path) -> None:
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                LAUNCH,
                str(commands),
                str(answers),
                str(CHROMIUM),
                *FLAGS,
                f"--user-data-dir={profile}",
            ],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._received = b""
        self._calls = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol and its answer; events that come before it are kept."""
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._calls:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._read], [], [], 60)
            part = os.read(self._read, 1 << 20) if ready else b""
            assert part, "the browser says nothing"
            self._received += part
        message, _, self._received = self._received.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def js(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Returns when an expression has become true."""
        until = time.monotonic() + 30
        while not self.js(expression):
            assert time.monotonic() < until, f"never came true: {expression}"
            time.sleep(0.02)

    def open(self, page: Path, *, width: int = 1280, scheme: str = "light", still: bool = True) -> None:
        """Loads a page as a screen of that width shows it."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
        )
        motion = "reduce" if still else "no-preference"
        features = {"prefers-color-scheme": scheme, "prefers-reduced-motion": motion}
        self.call("Emulation.setEmulatedMedia", features=[{"name": n, "value": v} for n, v in features.items()])
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        self.wait("document.documentElement?.dataset.ready === 'true'")

    def key(self, key: str) -> None:
        """Presses and lets go of a key."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def choose(self, selector: str, value: object) -> None:
        """Chooses an option of a list, or moves a slider, as a user does, and lets the page draw."""
        self.js(
            f"(() => {{ const it = document.querySelector({selector!r}); it.value = {str(value)!r};"
            "for (const kind of ['input', 'change']) it.dispatchEvent(new Event(kind, {bubbles: true})); })()"
        )
        self.settle()

    def settle(self) -> None:
        """Lets what was begun be drawn."""
        self.wait("!document.querySelector('[aria-busy=true]')")

    def pixels(self, selector: str, place: int = 0) -> np.ndarray:
        """uint8 [height, width, 3] of a canvas."""
        found = self.js(
            f"(() => {{ const it = document.querySelectorAll({selector!r})[{place}];"
            "const image = it.getContext('2d').getImageData(0, 0, it.width, it.height);"
            "let text = ''; for (const byte of image.data) text += String.fromCharCode(byte);"
            "return [it.width, it.height, btoa(text)]; })()"
        )
        width, height, content = found
        return np.frombuffer(base64.b64decode(content), np.uint8).reshape(height, width, 4)[..., :3].astype(int)

    def problems(self) -> list[object]:
        """Errors and warnings since the page was opened."""
        kinds = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
        return [event["params"] for event in self.events if event["method"] in kinds]

    def close(self) -> None:
        self._session = None
        self.call("Browser.close")
        self._process.wait(30)
        os.close(self._read)
        os.close(self._write)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def video_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((FRAMES, HEIGHT, WIDTH, 3), dtype=np.float32)


def bytes_of(video: np.ndarray) -> np.ndarray:
    return (video * 255).round().astype(np.uint8).astype(int)


VIDEOS = [[video_of(10 * prompt + run) for run in range(3)] for prompt in range(2)]


def level_map(step: int, layer: int, seed: int, order: TokenOrder | None) -> LevelMap:
    blocks = -(-GRID.seq_len // BLOCK)
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 6, (2, blocks, blocks), generator=generator, dtype=torch.int8)
    return LevelMap("transformer", step, layer, (0, 2), levels, GRID, order, BLOCK, BLOCK, 5)


MAPS = {
    name: {(3, layer): level_map(3, layer, 10 * run + layer, order) for layer in (0, 1)}
    for run, (name, order) in enumerate((("Plain", ORDER), (NASTY, None)))
}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prompts, each with a dense run and two sparse ones, whose first two steps of four were dense."""
    folder = tmp_path_factory.mktemp("report")
    report().write(folder)
    return folder / "report.html"


def report(num_videos: int = 6) -> ReportWriter:
    """Of six videos, of as many as there were to be."""
    about = {
        "program": "psa 0", "model": "tiny", "seed": 0, "width": WIDTH, "height": HEIGHT, "frames": FRAMES, "steps": 4,
        "guidance": 3.0, "fps": 8, "negative_prompt": None, "device": "cpu", "dtype": "float32",
        "maps": {"layers": [0, 1], "steps": [1, 3], "heads": [0, 2]},
    }  # fmt: skip
    writer = ReportWriter(about, num_videos=num_videos)
    for prompt, text in enumerate((NASTY, "another prompt")):
        writer.start_prompt(text)
        for run, name in enumerate(("dense", "Plain", NASTY)):
            layers = tuple(
                LayerStats("transformer", step, layer, 1.0 if dense else 0.3 + 0.1 * layer, 2, 2 if dense else 0)
                for step in range(4)
                for layer in (0, 1)
                for dense in [run == 0 or step < 2]
            )
            writer.add(
                ReportRun(
                    name=name,
                    description="",
                    file="video.mp4",
                    video=VIDEOS[prompt][run],
                    seconds=(4.0, 3.2, 5.0)[run],
                    step_seconds=(1.0, 1.0, 0.5, 0.5),
                    stats=AttentionStats(layers),
                    maps=tuple(MAPS[name].values()) if run and prompt == 0 else (),
                )
            )
    return writer


def colour(level: int, colours: tuple[str, ...] = LEVEL_COLOURS) -> list[int]:
    return list(bytes.fromhex(colours[level][1:]))


def shown_levels(browser: Browser, blocks: int, colours: tuple[str, ...] = LEVEL_COLOURS) -> list[list[int]]:
    """The levels of the picture of the map, read back from the colour in each cell, off its borders and outlines."""
    picture = browser.pixels("#level-map")
    height, width = picture.shape[:2]
    found = []
    for row in range(blocks):
        centres = [(round((row + 0.5) * height / blocks), round((x + 0.5) * width / blocks)) for x in range(blocks)]
        found.append([[colour(h, colours) for h in range(10)].index(picture[y, x].tolist()) for y, x in centres])
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_opens_from_disk_without_an_error_or_a_request(
    browser: Browser, page: Path, width: int, scheme: str
) -> None:
    browser.open(page, width=width, scheme=scheme)
    assert browser.problems() == []
    asked = [event["params"] for event in browser.events if event["method"] == "Network.requestWillBeSent"]
    assert {request["request"]["url"].partition(",")[0] for request in asked} <= {
        page.as_uri(),
        "data:image/png;base64",
    }
    assert browser.js("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    assert browser.js("[...document.querySelectorAll('canvas')].every((it) => it.clientWidth > 0)")
    assert len({tuple(pixel) for pixel in browser.pixels("#strip").reshape(-1, 3)}) > 5


def test_names_and_prompts_are_texts(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.js("document.querySelector('#prompt').textContent") == NASTY
    assert browser.js("[...document.querySelectorAll('#summary tbody tr')].map((it) => it.cells[0].textContent)") == [
        "dense",
        "Plain",
        NASTY,
    ]
    assert browser.js("document.querySelectorAll('script, img').length") == 2
    assert browser.js("document.title") == f"{NASTY} and 1 more · tiny"


def test_the_table_says_how_much_faster_a_preset_is(browser: Browser, page: Path) -> None:
    browser.open(page)
    cells = browser.js("[...document.querySelectorAll('#summary tr')].map((it) => it.cells[2].textContent)")
    assert [re.sub(r"[^\w.-]", "", cell) for cell in cells] == ["Speed-up", "", "1.25", "0.80"]
    names = "[...document.querySelectorAll('{} span')].map((it) => it.textContent)"
    assert browser.js(names.format("#time-keys")) == ["dense", "Plain", NASTY]
    assert browser.js(names.format("#frames-keys")) == ["Plain", NASTY]


def test_a_run_that_was_cut_short_says_so(browser: Browser, page: Path, tmp_path: Path) -> None:
    browser.open(page)
    notice = "(() => { const it = document.querySelector('#missing'); return [it.hidden, it.textContent]; })()"
    assert browser.js(notice) == [True, ""]
    report(num_videos=8).write(tmp_path)
    browser.open(tmp_path / "report.html")
    assert browser.js(notice) == [False, "The run was cut short: 2 videos of it are missing here."]


def assert_all_show(browser: Browser, frame: int, prompt: int = 0) -> None:
    for run in range(3):
        assert np.array_equal(browser.pixels("figure.run > canvas", run), bytes_of(VIDEOS[prompt][run][frame])), (
            f"run {run} does not show frame {frame}"
        )


def test_one_scrubber_moves_all_videos_and_the_curves(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert_all_show(browser, 0)
    browser.js("document.querySelector('#scrubber').focus()")
    browser.key("ArrowRight")
    assert browser.js("document.querySelector('#scrubber').value") == "1"
    assert_all_show(browser, 1)
    browser.choose("#scrubber", 3)
    assert_all_show(browser, 3)
    marks = browser.js(
        "[...document.querySelectorAll('#psnr-chart .now, #ssim-chart .now')].map((it) => it.dataset.at)"
    )
    assert marks == ["3", "3"]
    assert browser.js("document.querySelector('#frame-number').textContent") == "frame 3 / 3"
    browser.choose("#prompt-select", 1)
    assert browser.js("document.querySelector('#prompt').textContent") == "another prompt"
    assert_all_show(browser, 3, prompt=1)


def test_keys_and_buttons_play_and_step(browser: Browser, page: Path) -> None:
    browser.open(page)
    frame = "Number(document.querySelector('#scrubber').value)"
    for press, expected in (
        (lambda: browser.key("ArrowRight"), 1),
        (lambda: browser.js("document.querySelector('#forward').click()"), 2),
        (lambda: browser.key("ArrowLeft"), 1),
        (lambda: browser.key("End"), 3),
        (lambda: browser.key("ArrowRight"), 0),
        (lambda: browser.js("document.querySelector('#back').click()"), 3),
        (lambda: browser.key("Home"), 0),
    ):
        press()
        assert browser.js(frame) == expected
    playing = "document.querySelector('#play').getAttribute('aria-pressed')"
    assert browser.js(playing) == "false"
    browser.key(" ")
    assert browser.js(playing) == "true"
    browser.wait(f"{frame} === 2")
    browser.wait(f"{frame} === 1")  # around the end
    browser.key(" ")
    assert browser.js(playing) == "false"
    shown = browser.js("[...document.querySelectorAll('figure.run > canvas')].map((it) => Number(it.dataset.frame))")
    assert shown == [browser.js(frame)] * 3


def test_it_plays_by_itself_where_motion_is_welcome(browser: Browser, page: Path) -> None:
    browser.open(page, still=False)
    browser.wait("document.querySelector('#scrubber').value === '2'")


def test_the_difference_is_amplified_and_clipped(browser: Browser, page: Path) -> None:
    browser.open(page)
    dense = bytes_of(VIDEOS[0][0][0])
    for factor in (1, 4, 20):
        browser.choose("#amplify", factor)
        for run in (1, 2):
            expected = np.minimum(np.abs(bytes_of(VIDEOS[0][run][0]) - dense) * factor, 255)
            assert np.array_equal(browser.pixels(".under canvas", run - 1), expected)


@pytest.mark.parametrize(("scheme", "colours"), [("light", LEVEL_COLOURS), ("dark", LEVEL_COLOURS_DARK)])
def test_choices_show_the_level_map_of_that_place(
    browser: Browser, page: Path, scheme: str, colours: tuple[str, ...]
) -> None:
    browser.open(page, scheme=scheme)
    browser.choose("#choose-step", 3)
    for run, name in ((1, "Plain"), (2, NASTY)):
        browser.choose("#choose-run", run)
        for layer in (0, 1):
            browser.choose("#choose-layer", layer)
            for place, head in enumerate((0, 2)):
                browser.choose("#choose-head", head)
                expected = MAPS[name][3, layer].levels[place].tolist()
                assert shown_levels(browser, len(expected), colours) == expected


def assert_reads_means(browser: Browser, row: torch.Tensor, tile: float, columns: int) -> None:
    """What is left of the video: a patch of level h shows the mean over the patches of its 2^(h-1) tokens."""
    browser.js("document.querySelector('input[value=read]').click()")
    strip = browser.pixels("#strip")
    pixels = bytes_of(VIDEOS[0][1]).reshape(FRAMES, GRID.height, 4, GRID.width, 4, 3).mean(axis=(2, 4)).reshape(-1, 3)
    patch = tile / GRID.width
    checked = 0
    for block, level in enumerate(row.tolist()):
        pool = 2 ** (level - 1) if level else 1
        for first in range(block * BLOCK, min((block + 1) * BLOCK, GRID.seq_len), pool):
            places = range(max(first, GRID.text), min(first + pool, GRID.seq_len))
            tokens = [int(ORDER.order[place - GRID.text]) for place in places]
            for token in tokens if level != 1 else []:
                t, y, x = np.unravel_index(token, GRID.shape)
                top, left = (t // columns) * (patch * GRID.height + 17 + 6), (t % columns) * (tile + 6)
                at = strip[round(top + (y + 0.3) * patch), round(left + (x + 0.3) * patch)]
                expected = pixels[tokens].mean(axis=0) if level else np.array(colour(0))
                # The chosen patch has a dot on it; other colours are rounded to bytes.
                checked += bool((np.abs(at - expected) <= 1).all())
    there = sum(BLOCK for level in row[2:].tolist() if level != 1) - (-GRID.seq_len % BLOCK) * int(row[-1] != 1)
    assert checked >= there - 1


def test_the_row_of_a_patch_is_shown_where_its_keys_are(browser: Browser, page: Path) -> None:
    browser.open(page)
    for selector, value in (("#choose-step", 3), ("#tint", 100), ("#choose-run", 1), ("#choose-layer", 1)):
        browser.choose(selector, value)
    # Down the map to the last query block: the one row of arrows that is known without knowing the page.
    browser.js("document.querySelector('#level-map').focus()")
    for _ in range(20):
        browser.key("ArrowDown")
    levels = MAPS["Plain"][3, 1].levels[0]
    row = levels[-1]
    strip = browser.pixels("#strip")
    width = browser.js("document.querySelector('#strip').clientWidth")
    columns = int(browser.js("document.querySelector('#strip').dataset.columns"))
    tile = (width - 6 * (columns - 1)) / columns
    patch = tile / GRID.width
    right = total = 0
    for t in range(FRAMES):
        left, top = (t % columns) * (tile + 6), (t // columns) * (patch * GRID.height + 17 + 6)
        for y in range(GRID.height):
            for x in range(GRID.width):
                # Where the token stands in the sequence: behind the text, in the order of the curve.
                token = (t * GRID.height + y) * GRID.width + x
                place = GRID.text + int(ORDER.inverse[token])
                expected = colour(int(row[place // BLOCK]))
                # Off the middle, where the mark of the chosen patch is.
                at = strip[round(top + (y + 0.3) * patch), round(left + (x + 0.3) * patch)]
                total += 1
                right += at.tolist() == expected
    # All but the chosen patch, which has a dot on it.
    assert right >= total - 1
    assert_reads_means(browser, row, tile, columns)
    readout = browser.js("document.querySelector('#levels-readout').textContent")
    assert f"query block {len(levels) - 1} of {len(levels)}" in readout
    read = int((row > 0).sum())
    assert f"reads {read} key blocks of {len(row)}" in readout


def test_modes_and_patches_change_the_picture(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.choose("#choose-step", 3)
    seen = [browser.pixels("#strip")]
    for mode in ("read", "video"):
        browser.js(f"document.querySelector('input[value={mode}]').click()")
        seen.append(browser.pixels("#strip"))
    browser.js("document.querySelector('input[value=levels]').click()")
    assert np.array_equal(browser.pixels("#strip"), seen[0])
    browser.js("document.querySelector('#strip').focus()")
    before = browser.js("document.querySelector('#levels-readout').textContent")
    for key in ("PageUp", "PageUp", "ArrowUp", "ArrowLeft"):
        browser.key(key)
    after = browser.js("document.querySelector('#levels-readout').textContent")
    assert before.startswith("Patch at row 3, column 5 of frame 2")
    assert after.startswith("Patch at row 2, column 4 of frame 0")
    assert browser.js("document.querySelector('#scrubber').value") == "0"  # arrows moved the patch, not the video
    seen.append(browser.pixels("#strip"))
    assert all(not np.array_equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def small_report(folder: Path, names: list[str], negative: str | None = None) -> Path:
    """A page of one frame and one step, all runs after the first sparse."""
    about = {
        "program": "psa 0", "model": "tiny", "seed": 0, "width": 12, "height": 12, "frames": 1, "steps": 1,
        "guidance": 3.0, "fps": 8, "negative_prompt": negative, "device": "cpu", "dtype": "float32",
        "maps": {"layers": [0], "steps": [0], "heads": [0]},
    }  # fmt: skip
    writer = ReportWriter(about, num_videos=len(names))
    writer.start_prompt("a prompt")
    for run, name in enumerate(names):
        stats = AttentionStats((LayerStats("transformer", 0, 0, 0.5 if run else 1.0, 1, 0 if run else 1),))
        video = np.full((1, 12, 12, 3), 0.01 * run, np.float32)
        writer.add(ReportRun(name, "", "video.mp4", video, seconds=1.0, step_seconds=(1.0,), stats=stats))
    writer.write(folder)
    return folder / "report.html"


def test_a_page_of_a_dense_run_alone(browser: Browser, tmp_path: Path) -> None:
    browser.open(small_report(tmp_path, ["dense"]))
    assert browser.problems() == []
    assert "1 frame of 12\u00d712, 1 step," in browser.js("document.querySelector('#facts').textContent")
    notices = "[...document.querySelectorAll('main .notice')].map((it) => it.textContent)"
    assert browser.js(notices)[:3] == ["There is no sparse run."] * 3
    assert browser.js("document.querySelector('#density-readout').textContent") == ""


@pytest.mark.parametrize("width", [1280, 360])
def test_a_page_of_twenty_presets_with_odd_names(browser: Browser, tmp_path: Path, width: int) -> None:
    names = ["x" * 300, "\u202ereversed", "two\nlines", *(f"preset_{number}" for number in range(17))]
    browser.open(small_report(tmp_path, ["dense", *names], negative="\u202ebad"), width=width)
    assert browser.problems() == []
    keys = browser.js("[...document.querySelectorAll('#time-keys svg')].map((it) => it.outerHTML)")
    assert len(set(keys)) == len(keys) == 21
    assert browser.js("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    table = "document.querySelector('#summary').parentElement"
    assert browser.js(f"{table}.scrollWidth - {table}.clientWidth") == 0
    widths = browser.js("[...document.querySelectorAll('.run')].map((it) => it.offsetWidth)")
    assert max(widths) - min(widths) <= 1
    # What turns writing around stays within its name.
    for place in ("#facts", "#time-note", "#frames-note"):
        assert "\u202e" not in browser.js(f"document.querySelector('{place}').textContent")
    assert "\u2068reversed\u2069 1.00 s" in browser.js("document.querySelector('#time-note').textContent")


def test_what_is_missing_is_said(browser: Browser, page: Path) -> None:
    browser.open(page)
    notice = "document.querySelector('#levels-missing').textContent"
    hidden = "document.querySelector('#levels').hidden"
    browser.choose("#choose-step", 1)
    assert (
        browser.js(notice) == "Layer 0, step 1 of \u2068Plain\u2069 ran dense: every query reads every key at level 1."
    )
    assert browser.js(hidden) is True
    browser.choose("#choose-step", 3)
    assert browser.js(hidden) is False
    browser.choose("#prompt-select", 1)
    assert browser.js(notice) == "Layer 0, step 3 of \u2068Plain\u2069: no level map was kept."


def test_a_cell_of_the_density_map_chooses_its_level_map(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.js("document.querySelectorAll('#density canvas')[1].focus()")
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowDown"):
        browser.key(key)
    assert browser.js("document.querySelector('#density-readout').textContent") == (
        f"\u2068{NASTY}\u2069, layer 1, step 3: density 0.400; level map below"
    )
    chosen = "['run', 'layer', 'step'].map((name) => document.querySelector(`#choose-${name}`).value)"
    assert browser.js(chosen) == ["2", "1", "3"]


def test_every_control_has_a_name_and_shows_its_focus(browser: Browser, page: Path) -> None:
    browser.open(page)
    nameless = browser.js(
        "[...document.querySelectorAll('button, select, input, canvas[tabindex]')].filter((it) =>"
        "!it.getAttribute('aria-label') && !it.labels?.length).map((it) => it.outerHTML)"
    )
    assert nameless == []
    browser.js("document.querySelector('#scrubber').focus()")
    browser.key("Tab")
    focused = browser.js(
        "(() => { const it = document.activeElement; return [it.id, getComputedStyle(it).outlineStyle]; })()"
    )
    assert focused == ["speed", "solid"]
