"""The page, in a real browser on a real server. Texts of answers are scripted, since a random model writes none."""

from __future__ import annotations

import base64
import copy
import dataclasses
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import av
import numpy as np
import pytest

from keye_jax.processor.guard import MediaGuard
from keye_jax.serve.page import content_security_policy, page
from tests.keye_jax.serve.conftest import Running, wait_for
from tests.keye_jax.serve.scripted import ScriptedEngine

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTHS = (390, 820, 1440)


class Elements(HTMLParser):
    """The elements of a page: (tag, attributes), and the text of scripts and styles."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inline: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.found and (tag := self.found[-1][0]) in self.inline and self.cdata_elem == tag:
            self.inline[tag].append(data)


class TestFile:
    def test_nothing_in_it_needs_what_its_policy_forbids(self):
        elements = Elements(page())
        for tag, attributes in elements.found:
            assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
            for name in ("src", "href", "action"):
                assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
        assert [len(texts) for texts in elements.inline.values()] == [1, 1]
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", page())

    def test_the_policy_allows_its_script_and_no_other(self):
        policy = dict(part.split(" ", 1) for part in content_security_policy("<script>a()</script>").split("; "))
        # echo -n 'a()' | openssl dgst -sha256 -binary | base64
        assert policy["script-src"] == "'sha256-qVpDBgj7bpq5hMAcGp3AOc79J3Y1Z4HvySTwKrWDoy4='"
        assert policy["style-src"] == policy["default-src"] == policy["frame-ancestors"] == "'none'"
        assert policy["connect-src"] == "'self'"


SECONDS, FRAMES = 4, 8
ANSWER = """\
A **ball** turns at **0:02**, and again at 3.5 seconds.

- From 1 to 2.5 s it rests.
- It ends at <|clip_time_start|>3<|clip_time_end|>, not at 12:30.

1.2-2.8

Of 3-4 balls one rolls.

<img src=x onerror="document.title='run'"> `0:01`"""
REASONING = "The ball is there at 0:00."


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Four seconds in a codec that every Chromium plays."""
    path = tmp_path_factory.mktemp("clip") / "ball.webm"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=8)
        stream.width, stream.height, stream.pix_fmt = 160, 90, "yuv420p"
        for number in range(8 * SECONDS):
            pixels = np.full((90, 160, 3), 40, np.uint8)
            pixels[30:60, 4 * number : 4 * number + 30] = 220
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def scripted(engine):
    return ScriptedEngine(engine, REASONING, ANSWER)


@pytest.fixture(scope="module")
def address(scripted):
    with Running(scripted) as running:
        yield running.url


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address):
    """Opens the page in a window of its own; afterwards nothing may have gone wrong in it."""
    contexts, wrong = [], []

    def call(width=1440, scheme="light", url=address):
        size = {"width": width, "height": 900}
        context = browser.new_context(
            viewport=size, color_scheme=scheme, permissions=["clipboard-read", "clipboard-write"]
        )
        contexts.append(context)
        context.set_default_timeout(60_000)
        opened = context.new_page()
        opened.on("pageerror", lambda error: wrong.append(str(error)))
        # What the policy forbids is an error of the console too.
        opened.on("console", lambda line: line.type == "error" and wrong.append(line.text))
        opened.goto(url)
        until(opened, "model")
        return opened

    yield call
    for context in contexts:
        context.close()
    assert [text for text in wrong if "status of 400" not in text] == []


def until(opened, condition):
    """Waits for a condition, of the page if it is a text. Playwright's own way needs eval, which the policy forbids."""
    for _ in range(600):
        if condition() if callable(condition) else opened.evaluate(condition):
            return
        opened.wait_for_timeout(50)
    raise AssertionError(f"{condition} does not become true")


def drop(opened, path):
    """Drops a file onto the page, as from a file manager."""
    content = base64.b64encode(path.read_bytes()).decode()
    opened.evaluate(
        """([content, name]) => {
          const transfer = new DataTransfer();
          const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
          transfer.items.add(new File([bytes], name, {type: "video/webm"}));
          for (const kind of ["dragover", "drop"])
            document.body.dispatchEvent(new DragEvent(kind, {dataTransfer: transfer, bubbles: true, cancelable: true}));
        }""",
        [content, path.name],
    )


def ask(opened, question):
    """Asks by keyboard, and waits for the end of the answer."""
    before = opened.locator(".turn").count()
    opened.get_by_label("Your question").fill(question)
    opened.keyboard.press("Enter")
    turn = opened.locator(".turn").nth(before)
    turn.locator(".actions").wait_for()
    return turn


def current_time(opened):
    return opened.locator("video").evaluate("(video) => video.currentTime")


@pytest.mark.slow
class TestBrowser:
    def test_drop_ask_seek_and_ask_again(self, open_page, clip, scripted):
        opened = open_page()
        drop(opened, clip)
        until(opened, "document.querySelector('video').currentTime > 0.1")  # it plays
        assert opened.locator("video").get_attribute("src").startswith("blob:")
        opened.locator("#frames-card").wait_for()
        assert opened.locator("#frames-title").inner_text() == f"The model saw {FRAMES} frames"
        assert opened.locator(".ticks path").get_attribute("d").count("M") == FRAMES

        first = ask(opened, "What happens?")
        text = first.locator(".text")
        assert "<img src=x onerror=" in text.inner_text() and text.locator("img").count() == 0
        assert text.locator("strong, li, code").count() == 5 and opened.title() != "run"
        assert REASONING not in first.inner_text()  # it is folded
        first.locator("summary").click()
        assert REASONING in first.inner_text()
        written = ["0:02", "3.5 seconds", "1", "2.5 s", "0:03", "1.2", "2.8", "0:01"]
        assert text.locator(".time").all_inner_texts() == written
        for label, seconds in zip(written, (2, 3.5, 1, 2.5, 3, 1.2, 2.8, 1), strict=True):
            text.locator(".time", has_text=re.compile(f"^{re.escape(label)}$")).click()
            assert abs(current_time(opened) - seconds) < 0.01
            assert opened.locator("#position").get_attribute("aria-valuetext").startswith(f"0:0{seconds:.1f} of")
        marked = opened.locator("#strip [aria-current=true]")
        assert marked.count() == 1 and marked.locator("img").count() == 1

        assert opened.locator(".heat rect").count() == FRAMES
        shares = opened.locator("#heat-rows td:nth-child(2)").all_text_contents()
        assert len(shares) == FRAMES and 0 < sum(float(share.rstrip("%")) for share in shares) <= 100.5
        assert re.match(
            r"Of what it looked at in the prompt, the video \d+%, text \d+%\. Most of all the frames at 0:0",
            opened.locator("#heat-text").inner_text(),
        )

        hits = scripted.stats().embedding_hits
        second = ask(opened, "And then?")
        assert scripted.stats().embedding_hits == hits + 1  # nothing was decoded
        assert first.locator(".cached").inner_text() == "0"
        assert int(second.locator(".cached").inner_text().replace(",", "")) > 0
        assert "first token after" in second.locator(".meta").inner_text()
        pressed = opened.get_by_role("button", name="What it looked at", pressed=True)
        assert pressed.count() == 1
        pressed.click()
        assert not opened.locator("#heat-card").is_visible()

    def test_by_keyboard_alone(self, open_page, clip):
        opened = open_page(820)
        choosers = []
        opened.on("filechooser", lambda chooser: choosers.append(chooser))

        def tab_to(name):
            for _ in range(40):
                opened.keyboard.press("Tab")
                found = opened.evaluate("document.activeElement.ariaLabel || document.activeElement.textContent")
                if re.fullmatch(name, found.strip()):
                    return
            raise AssertionError(f"Tab does not come to {name}")

        opened.keyboard.press("Tab")
        assert opened.evaluate("document.activeElement.textContent") == "Skip to the question"
        tab_to("Choose a video or a picture")
        opened.keyboard.press("Enter")
        until(opened, lambda: choosers)
        choosers[0].set_files(clip)
        opened.locator("#frames-card").wait_for()
        assert opened.evaluate("document.activeElement.id") == "question"
        opened.keyboard.type("What happens?")
        opened.keyboard.press("Enter")
        opened.locator(".actions").wait_for()
        opened.evaluate("document.activeElement.blur(), scrollTo(0, 0)")
        tab_to("Play|Pause")
        if opened.evaluate("document.activeElement.ariaLabel") == "Pause":
            opened.keyboard.press("Enter")
        opened.keyboard.press("Shift+Tab")
        assert opened.evaluate("document.activeElement.ariaLabel") == "Position in the video"
        opened.keyboard.press("Home")
        opened.keyboard.press("ArrowRight")
        assert abs(current_time(opened) - 1) < 0.01
        tab_to("Frame at 0:.*")
        opened.keyboard.press("End")
        opened.keyboard.press("Enter")
        assert current_time(opened) > SECONDS - 0.6
        tab_to("3.5 seconds, go there")
        opened.keyboard.press("Enter")
        assert abs(current_time(opened) - 3.5) < 0.01
        opened.evaluate("document.activeElement.blur()")
        tab_to("Settings")
        opened.keyboard.press("Enter")
        assert opened.get_by_role("dialog", name="Settings").is_visible()
        opened.keyboard.press("Escape")
        assert not opened.get_by_role("dialog", name="Settings").is_visible()

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_widths_contrast_and_names(self, open_page, clip, scheme):
        opened = open_page(scheme=scheme)
        for step in ("empty", "chosen", "answered", "refused"):
            if step == "chosen":
                drop(opened, clip)
                opened.locator("#frames-card").wait_for()
            elif step == "answered":
                ask(opened, "What happens?")
            elif step == "refused":
                set_temperature(opened, "-1")
                ask(opened, "And then?")
            for width in WIDTHS:
                opened.set_viewport_size({"width": width, "height": 900})
                wide = opened.evaluate("document.documentElement.scrollWidth")
                assert wide == width, (step, width)
            assert opened.evaluate(FAINT) == [], step
            nodes = opened.context.new_cdp_session(opened).send("Accessibility.getFullAXTree")["nodes"]
            roles = ("button", "textbox", "slider", "combobox", "dialog", "Video", "progressbar", "toolbar")
            named = [
                (node["role"]["value"], node["name"]["value"])
                for node in nodes
                if not node["ignored"] and node["role"]["value"] in roles
            ]
            assert len(named) > 3 and all(name for _, name in named), (step, named)

    def test_a_refusal_is_said_and_can_be_tried_again(self, open_page):
        opened = open_page(390)
        set_temperature(opened, "-1")
        ask(opened, "What is two and two?")
        alert = opened.get_by_role("alert").filter(has_text="temperature")
        assert re.fullmatch(r"temperature is -1\S*; it must be .*", alert.locator("span").inner_text())
        set_temperature(opened, "")
        alert.get_by_role("button", name="Try again").click()
        opened.locator(".turn .meta").wait_for()
        assert opened.locator(".turn").count() == 1 and opened.get_by_role("alert").count() == 0

    def test_copies_are_the_request_that_was_sent(self, open_page, clip, scripted):
        opened = open_page()
        drop(opened, clip)
        turn = ask(opened, 'What\'s "this" in C:\\films?\n')
        sent = dataclasses.replace(scripted.asked[-1], id="")
        assert sent.selection_heat
        for label, command, end in (("curl", ["bash", "-c"], "[DONE]"), ("Python", [sys.executable, "-c"], "`0:01`")):
            turn.get_by_role("button", name=f"Copy as {label}").click()
            turn.get_by_text("Copied", exact=True).wait_for()
            copied = opened.evaluate("navigator.clipboard.readText()")
            done = subprocess.run([*command, copied], capture_output=True, text=True, timeout=120)
            assert done.returncode == 0 and done.stdout.strip().endswith(end), done
            assert dataclasses.replace(scripted.asked[-1], id="") == sent
            turn.get_by_text("Copied", exact=True).wait_for(state="detached")

    def test_stop(self, open_page, scripted, monkeypatch):
        monkeypatch.setattr(scripted, "pause_s", 0.5)
        before = scripted.cancelled
        opened = open_page()
        opened.get_by_label("Your question").fill("What is a ball?")
        opened.keyboard.press("Enter")
        opened.locator(".turn .text p").wait_for()
        opened.keyboard.press("Escape")
        opened.locator(".turn .meta").get_by_text("Stopped").wait_for()
        wait_for(lambda: scripted.cancelled == before + 1)
        assert "0:01" not in opened.locator(".turn .text").inner_text()

    def test_paths_only_where_they_may_be_read(self, open_page, address, scripted, clip):
        opened = open_page()
        assert not opened.get_by_label("Path of a video").is_visible()
        opened.close()
        planner = scripted.processor.media
        guarded = ScriptedEngine(scripted, REASONING, ANSWER)
        guarded.processor = copy.copy(scripted.processor)
        guarded.processor.media = copy.copy(planner)
        guarded.processor.media._guard = MediaGuard(root=clip.parent)
        with Running(guarded) as running:
            opened = open_page(url=running.url)
            for path in ("nothing.webm", clip.name):
                opened.get_by_label("Path of a video").fill(path)
                opened.keyboard.press("Enter")
                if path != clip.name:
                    alert = opened.get_by_role("alert").filter(has_text="there is no such file")
                    alert.wait_for()
            # The browser cannot play it: the frames stand in the place of the player.
            opened.locator("#frames-card").wait_for()
            picture = opened.locator("#stage img")
            for place in (0, FRAMES - 1):
                opened.locator("#strip button").nth(place).click()
                wait_for(lambda: picture.evaluate("(image) => image.naturalWidth > 0"))
                time = opened.locator("#strip button").nth(place).inner_text()
                wait_for(lambda time=time: picture.get_attribute("alt") == f"Frame at {time}")
            assert opened.locator("video").count() == 0


def set_temperature(opened, value):
    opened.get_by_role("button", name="Settings").click()
    opened.get_by_label("Temperature").fill(value)
    opened.get_by_role("button", name="Apply").click()


# Visible texts with a contrast below that of WCAG 2.2, 1.4.3: 4.5, or 3 for large ones.
FAINT = """
() => {
  const paint = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const blend = (colours) => {
    paint.clearRect(0, 0, 1, 1);
    for (const colour of colours) { paint.fillStyle = colour; paint.fillRect(0, 0, 1, 1); }
    return [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((x) => x / 255).map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own && !element.placeholder || !element.checkVisibility({visibilityProperty: true})) continue;
    if (element.closest(".only-read, .skip, script, style")) continue;
    const behind = [];
    for (let node = element; node; node = node.parentElement) behind.unshift(getComputedStyle(node).backgroundColor);
    const style = getComputedStyle(element, own ? null : "::placeholder");
    const [a, b] = [light(blend([...behind, style.color])), light(blend(behind))].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < (parseFloat(style.fontSize) >= 24 ? 3 : 4.5)) found.push([element.className, contrast]);
  }
  return found;
}
"""
