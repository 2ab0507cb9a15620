"""The report in a real browser: slider, curtain, picker, keyboard, phone, dark, several runs, a page that renews."""

import threading
import time

import numpy as np
import pytest
from helpers.browser import browser, missing_browser
from helpers.run_folders import write_run

from agents.report.page import render
from agents.report.server import ReportServer

pytestmark = pytest.mark.skipif(bool(missing_browser()), reason=f"needs chromium and chromedriver: {missing_browser()}")

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
ANSWERS = {"answer": [HOSTILE, "a dog", "a fox", "a cat"]}
SHOWN = "return document.querySelector(arguments[0]).getAttribute('src')"
CHECKED = "return [...document.querySelectorAll('.panel')].map(one => one.querySelector(':checked').value)"
WIDTHS = "return [document.documentElement.scrollWidth, innerWidth]"


@pytest.fixture(scope="module")
def window():
    """A browser window."""
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Reports of one run and of two runs, whose evaluations are at other iterations."""
    folder = tmp_path_factory.mktemp("runs")
    holdout = [[1.0, 1.0, 1.0, 0.9], [0.5, 0.4, 0.5, 0.5], [0.1, 0.2, 0.1, 0.0]]
    prompts = [HOSTILE, "a dog", "a fox", "a cat"]
    runs = [
        write_run(folder / "first-of-the-runs-with-a-long-name", holdout=holdout, prompts=prompts, details=ANSWERS),
        write_run(folder / "second", rewards=[[1.0] * 4, [2.0, 1, 2, 2]], prompts=prompts),
    ]
    files = {"one": runs[:1], "two": runs}
    for name, shown in files.items():
        (folder / f"{name}.html").write_text(render(shown), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in files}


@pytest.fixture
def one(window, pages):
    """The report of one run on a desk; nothing but the file is requested, and the console stays silent."""
    window.show_as(1280, 900)
    window.open(pages["one"])
    yield window
    assert window.messages() == []
    assert {request for request in window.requests() if not request.startswith("data:")} == {pages["one"].as_uri()}


def focus(window, selector):
    window.run("document.querySelector(arguments[0]).focus()", selector)


def test_slider_moves_through_the_iterations_by_keyboard(one):
    assert one.text("#iteration-shown") == "4"
    last, picture = one.run(SHOWN, ".large .after"), one.run(SHOWN, ".tile img")
    assert last == picture
    assert last != one.run(SHOWN, ".large .before")
    focus(one, "#iteration")
    one.press("left")
    assert one.text("#iteration-shown") == "2"
    assert one.run("return document.querySelector('#iteration').getAttribute('aria-valuetext')") == "iteration 2"
    assert one.run(SHOWN, ".large .after") not in (last, one.run(SHOWN, ".large .before"))
    cursor = (
        "const c = document.querySelector('.cursor'); return [c.x1.baseVal.value, +c.dataset.left, +c.dataset.right]"
    )
    x, left, right = one.run(cursor)
    assert x == pytest.approx((left + right) / 2)
    one.press("home")
    assert one.run(SHOWN, ".large .after") == one.run(SHOWN, ".large .before")


def test_play_goes_to_the_end_and_stops(one):
    focus(one, "#iteration")
    one.press("home")
    one.click("#play")
    assert one.run("return document.querySelector('#play').getAttribute('aria-pressed')") == "true"
    wait(lambda: one.text("#iteration-shown") == "4")
    wait(lambda: one.run("return document.querySelector('#play').getAttribute('aria-pressed')") == "false")


def test_prompt_is_picked_by_click_and_by_keyboard(one):
    first = one.run(SHOWN, ".large .after")
    one.click(".tile:nth-child(3)")
    assert one.text(".large .prompt") == "a fox"
    assert one.run(SHOWN, ".large .after") != first
    one.press("left")
    assert one.text(".large .prompt") == "a dog"
    assert "a dog" in one.text(".notes")
    assert one.run(CHECKED) == ["1"]


def test_curtain_moves_by_keyboard_and_by_pointer(one):
    shown = "return getComputedStyle(document.querySelector('.before')).clipPath"
    before = one.run(shown)
    focus(one, ".reveal")
    one.press("left", "left")
    assert one.run("return document.querySelector('.reveal').value") == "48"
    moved = one.run(shown)
    assert moved != before
    one.press("home")
    edge = (
        "const box = document.querySelector('.curtain').getBoundingClientRect(); return [box.left, box.width, box.top]"
    )
    left, width, top = one.run(edge)
    one.drag((left + 0.5 * width, top + 50), (left + 0.8 * width, top + 60))
    assert one.run("return document.querySelector('.reveal').value") == "80"
    edge = "return document.querySelector('.edge').getBoundingClientRect().left"
    assert one.run(edge) == pytest.approx(left + 0.8 * width, abs=2)


def test_everything_that_acts_is_reached_by_tab_and_shows_its_focus(one):
    one.run("document.activeElement.blur()")
    reached, outlined = [], []
    focused = """
        const at = document.activeElement;
        const shows = at.closest('.curtain, .tile') ?? at;
        return [at.id || at.className || at.name || at.tagName, getComputedStyle(shows).outlineStyle];
    """
    for _ in range(12):
        one.press("tab")
        name, outline = one.run(focused)
        reached.append(name)
        outlined.append(outline)
    order = ["play", "iteration", "reveal", "sample-0", "copy"]
    assert [name for name in dict.fromkeys(reached) if name in order] == order
    assert {outline for name, outline in zip(reached, outlined, strict=True) if name != "BODY"} == {"solid"}


def test_hostile_prompt_and_answer_are_shown_as_they_are(one):
    assert one.text(".large .prompt") == HOSTILE
    assert one.text(".tile .answer") == f"“{HOSTILE}”"
    assert one.run("return typeof window.hacked") == "undefined"
    unnamed = "e => !e.labels?.length && !e.ariaLabel && !e.textContent"
    assert one.run(f"return [...document.querySelectorAll('input, button')].filter({unnamed}).length") == 0


@pytest.mark.parametrize("page", ["one", "two"])
def test_phone_needs_no_scrolling_to_the_side(window, pages, page):
    for width in (320, 390):
        window.show_as(width, 800)
        window.open(pages[page])
        assert window.run(WIDTHS) == [width, width]
    side = "return [...document.querySelectorAll('.curtain')].every(one => one.clientWidth > 200)"
    assert window.run(side)
    assert window.run("return parseFloat(getComputedStyle(document.querySelector('.tick')).fontSize)") >= 10


def test_dark_and_light_follow_the_system(window, pages):
    brightness = """
        const of = (name) => getComputedStyle(document.body)[name].match(/[0-9]+/g).slice(0, 3).map(Number);
        return [Math.max(...of('backgroundColor')), Math.max(...of('color'))];
    """
    window.show_as(800, 600, "light")
    window.open(pages["one"])
    background, ink = window.run(brightness)
    assert (background > 230, ink < 60) == (True, True)
    window.show_as(800, 600, "dark")
    background, ink = window.run(brightness)
    assert (background < 60, ink > 200) == (True, True)


def test_runs_side_by_side_move_together(window, pages):
    window.show_as(1280, 900)
    window.open(pages["two"])
    images = "return [...document.querySelectorAll('.panel .after')].map(one => one.getAttribute('src'))"
    tags = "return [...document.querySelectorAll('.tag.right')].map(one => one.textContent)"
    tops = "return [...document.querySelectorAll('.panel')].map(one => one.getBoundingClientRect().top)"
    assert len(set(window.run(tops))) == 1
    assert window.run(tags) == ["iteration 4", "iteration 2"], "a shorter run shows its last evaluation"
    before = window.run(images)
    window.click(".panel:nth-child(2) .tile:nth-child(4)")
    assert window.run(CHECKED) == ["3", "3"]
    assert all(now != then for now, then in zip(window.run(images), before, strict=True))
    focus(window, "#iteration")
    window.press("home")
    assert window.run(tags) == ["iteration 0", "iteration 0"]
    assert window.messages() == []


def test_sounds_and_videos_can_be_played(window, tmp_path):
    tone = np.sin(np.arange(4000) / 8, dtype=np.float32)[None, None].repeat(4, axis=0)
    film = np.random.default_rng(0).integers(0, 255, (4, 3, 16, 16, 3), dtype=np.uint8)
    pages = {}
    for name, samples in (("sound", tone), ("film", film)):
        pages[name] = tmp_path / f"{name}.html"
        pages[name].write_text(render([write_run(tmp_path / name, samples=samples)]), encoding="utf-8")
    window.show_as(1280, 900)
    window.open(pages["sound"])
    lengths = "return [...document.querySelectorAll('audio')].map(one => one.duration)"
    wait(lambda: window.run(lengths) == [0.5, 0.5])
    window.open(pages["film"])
    assert window.run(SHOWN, ".large .after").startswith("data:image/webp")
    wait(lambda: window.run("return document.querySelector('.large .after').naturalWidth") == 16)
    window.run(
        "window.loads = 0; document.querySelector('.large .after').addEventListener('load', () => window.loads++)"
    )
    focus(window, ".reveal")
    window.press("left", "left")
    assert window.run("return window.loads") == 0, "a film goes on when the curtain moves"
    assert window.messages() == []


def test_report_of_the_size_of_a_default_run_opens_within_two_seconds(window, tmp_path):
    page = tmp_path / "page.html"
    run = write_run(tmp_path / "run", rewards=[[0.0] * 9] * 11, prompts=["a cat"] * 9, size=64)
    page.write_text(render([run]), encoding="utf-8")
    assert 1_000_000 < page.stat().st_size < 5_000_000, "noise is larger than what a model generates"
    took = []
    for _ in range(3):
        window.open(page)
        took.append(window.run("return performance.timing.loadEventEnd - performance.timing.navigationStart"))
    assert min(took) < 2000


def test_page_of_a_run_that_goes_on_renews_itself_and_keeps_its_place(window, tmp_path):
    run = write_run(tmp_path / "run", is_finished=False)
    with ReportServer([run], 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        window.open(server.address)
        assert window.text(".status") == "iteration 4 of 4"
        window.click(".tile:nth-child(2)")
        focus(window, "#iteration")
        window.press("home")
        (run / "error.txt").write_text("it stopped")
        wait(lambda: window.run("return document.readyState") == "complete" and "error" in window.text(".status"))
        assert window.text("#iteration-shown") == "0"
        assert window.run(CHECKED) == ["1"]
        assert window.messages() == []
        server.shutdown()
        thread.join()


def wait(is_so, seconds=30.0):
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
