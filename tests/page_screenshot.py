"""Makes docs/page.webp, a picture of the page: `python -m tests.page_screenshot docs/page.webp`.

It needs Chromium and playwright. The clip is generated. The answer and its heat are scripted, since a tiny model with
random weights has none worth reading; the server, the engine below it, and the frames are real.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import io
import math
import shutil
import tempfile
from pathlib import Path

from PIL import Image

from convert.synthetic import write_checkpoint
from keye_jax.config import KeyeConfig
from keye_jax.engine.checkpoint import load
from keye_jax.engine.engine import Engine
from keye_jax.engine.options import EngineOptions
from keye_jax.testing import write_processor_files
from keye_jax.train.shapes.scene import Object, Scene, Span, sampled_times
from keye_jax.train.shapes.video import write_video
from tests.keye_jax.serve.conftest import Running
from tests.keye_jax.serve.scripted import ScriptedEngine

FRAMES, RATE = 40, 8.0
SCENE = Scene(
    rate=RATE,
    times=sampled_times(FRAMES, RATE),
    objects=(
        Object(
            "star", (Span(0, 8, "yellow"), Span(9, 39, "red")), 27, (84, 84), (34, 14), (0.5, 0.8), (0, 0.5), tilt=0.2
        ),
        Object("circle", (Span(2, 33, "blue"),), 19, (70, 78), (46, 22), (0.35, 0.6), (-1.4, 1)),
        Object("triangle", (Span(0, 39, "green"),), 17, (118, 96), (22, 10), (0.4, 0.7), (2, 0), tilt=0.1),
    ),
    word="lake",
    word_frames=(18, 22),
    clock=0.0,
    background=((196, 214, 226), (120, 150, 168)),
)
REASONING = "The star changes its colour once. The circle comes and goes. A word is shown for a while."
# Question, answer, and seconds at which something happens, with weights.
TURNS = (
    (
        "What happens? List the events with their times.",
        """\
The clip shows a **star** and a green triangle that drift over a blue-grey background, with a clock below them.

1. **0:01** A blue circle comes from the left.
2. **4.7 s** The star turns from yellow to red.
3. **9.2 s to 11.2 s** The word `LAKE` stands at the top.
4. **0:17** The circle is gone. The star and the triangle stay until the end.""",
        {1.0: 0.8, 4.6: 2.2, 9.2: 1.2, 10.9: 0.7, 17.0: 0.9},
    ),
    (
        "What is in front of what while the word is there?",
        """\
The word appears at **9.2 s**. The triangle is in front of the circle then, and the star is beside them.

The word is last seen at **11.2 s**.""",
        {4.6: 0.3, 9.2: 2.2, 10.2: 1.3, 11.1: 1.7},
    ),
)


def heat(peaks: dict[float, float]) -> tuple[float, ...]:
    """Weights of the frames: high near `peaks`, which are seconds with weights."""
    return tuple(
        0.1 + sum(weight * math.exp(-(((time - peak) / 0.7) ** 2)) for peak, weight in peaks.items())
        for time in SCENE.times
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="the picture; the ending of its name decides the format")
    parser.add_argument("--width", type=int, default=1440, help="of the window, in CSS pixels")
    parser.add_argument("--height", type=int, default=960)
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    arguments = parser.parse_args()
    # It is no dependency of the tests.
    playwright_api = importlib.import_module("playwright.sync_api")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_video(folder / "shapes.mp4", SCENE, scale=3, crf=18)
        write_video(folder / "other.mp4", dataclasses.replace(SCENE, word="moon"))
        config = KeyeConfig.from_file(Path(__file__).parent / "golden" / "a")
        write_checkpoint(folder / "checkpoint", config, seed=0)
        write_processor_files(folder / "checkpoint", config)
        loaded = load(folder / "checkpoint", dtype="float32", prefill_chunk=128, media={"max_pixels": 50176})
        options = EngineOptions(
            rows=1, cache_tokens=8192, max_context=4096, small_chunk=64, media_workers=1, selection_heat=True
        )
        with (
            Engine(*loaded, options=options) as engine,
            Running(scripted := ScriptedEngine(engine, REASONING, "", pause_s=0.01)) as running,
            playwright_api.sync_playwright() as playwright,
        ):
            running.service.name = "keye-orbax"
            executable = shutil.which("chromium") or shutil.which("google-chrome")
            browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
            size = {"width": arguments.width, "height": arguments.height}
            page = browser.new_page(viewport=size, color_scheme=arguments.scheme, device_scale_factor=2)
            page.set_default_timeout(300_000)
            page.goto(running.url)
            # The first clip is only there so that all programs are compiled.
            for name, turns in (("other", TURNS[:1]), ("shapes", TURNS)):
                page.set_input_files("#file", folder / f"{name}.mp4")
                page.locator("#frames-card").wait_for()
                for number, (question, scripted.text, peaks) in enumerate(turns):
                    scripted.heat = heat(peaks)
                    page.get_by_label("Your question").fill(question)
                    page.keyboard.press("Enter")
                    page.locator(".actions").nth(number).wait_for()
            page.get_by_role("button", name="9.2 s, go there").last.click()
            page.mouse.move(0, 0)
            # Thumbnails come one by one.
            page.wait_for_timeout(3000)
            picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            picture.save(arguments.out, quality=82)
            browser.close()


if __name__ == "__main__":
    main()
