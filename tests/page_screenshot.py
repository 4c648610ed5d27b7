"""Makes docs/page.webp, a picture of the page: `python -m tests.page_screenshot docs/page.webp`.

The package's small model answers a question about a generated clip that it was not trained on. It needs Chromium and
playwright.
"""

from __future__ import annotations

import argparse
import importlib
import io
import itertools
import shutil
import tempfile
from pathlib import Path

from PIL import Image

from keye_jax import presets
from keye_jax.engine.engine import Engine
from keye_jax.engine.options import EngineOptions
from keye_jax.train.shapes.questions import ask
from keye_jax.train.shapes.scene import HELD_OUT, Scene, SceneOptions, make_scene
from keye_jax.train.shapes.video import write_video
from tests.keye_jax.serve.conftest import Running


def scene_and_question(seed: int) -> tuple[Scene, str]:
    """A clip of which it can be asked when something is to be seen, and that question."""
    for number in itertools.count():
        scene = make_scene(HELD_OUT + seed, SceneOptions(needle=0.0), number=number)
        questions = ask(scene, 1, (seed, number), kinds={"when": 1.0})
        if questions:
            return scene, questions[0].text
    raise AssertionError("numbers never end")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="the picture; the ending of its name decides the format")
    parser.add_argument("--seed", type=int, default=2, help="of the clip")
    parser.add_argument("--width", type=int, default=1440, help="of the window, in CSS pixels")
    parser.add_argument("--height", type=int, default=960)
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    arguments = parser.parse_args()
    # It is no dependency of the tests.
    playwright_api = importlib.import_module("playwright.sync_api")

    scene, question = scene_and_question(arguments.seed)
    options = EngineOptions(rows=1, cache_tokens=4096, media_workers=1, selection_heat=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        Engine.from_checkpoint(presets.EMBEDDED_CHECKPOINT, options=options) as engine,
        Running(engine) as running,
        playwright_api.sync_playwright() as playwright,
    ):
        engine.warmup()
        running.service.name = presets.EMBEDDED_CHECKPOINT.name
        write_video(Path(folder) / "shapes.mp4", scene, scale=3, crf=18)
        executable = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        size = {"width": arguments.width, "height": arguments.height}
        page = browser.new_page(viewport=size, color_scheme=arguments.scheme, device_scale_factor=2)
        page.set_default_timeout(300_000)
        page.goto(running.url)
        page.set_input_files("#file", Path(folder) / "shapes.mp4")
        page.locator("#frames-card").wait_for()
        page.get_by_label("Your question").fill(question)
        page.keyboard.press("Enter")
        page.locator(".actions").wait_for()
        page.locator(".text .time").first.click()
        page.mouse.move(0, 0)
        # Thumbnails come one by one.
        page.wait_for_timeout(3000)
        picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        picture.save(arguments.out, quality=82)
        browser.close()


if __name__ == "__main__":
    main()
