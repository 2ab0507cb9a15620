"""Votes in a real browser: by click, by key and by touch; hostile prompts; the look on a phone."""

import pytest
from helpers.browser import browser, missing_browser
from helpers.votings import HOSTILE, voting, wait_for

pytestmark = pytest.mark.skipif(bool(missing_browser()), reason=f"needs chromium and chromedriver: {missing_browser()}")

OPEN = "return document.getElementById('pair').hidden ? 0 : parseInt(document.getElementById('status').textContent)"


@pytest.fixture(scope="module")
def window():
    """A browser window."""
    with browser() as opened:
        yield opened


def shows(window, count):
    wait_for(lambda: window.run(OPEN) == count)


def test_votes_are_cast_by_click_and_by_keys(window):
    with voting(5) as (page, sides):
        window.open(page.address)
        shows(window, 5)
        assert window.text("#question") == "Which is better?"
        assert window.text("#prompt") == "Prompt: a fox"
        window.click("#right")
        shows(window, 4)
        window.press("left")
        shows(window, 3)
        window.press("right")
        shows(window, 2)
        window.press("1")
        shows(window, 1)
        window.press("2")
        wait_for(lambda: "more images will come" in window.text("#status"))
        assert sides == ["right", "left", "right", "left", "right"]
        assert window.messages() == []
        assert all(one.startswith((page.address, "data:")) for one in window.requests())


def test_keys_pressed_before_the_answer_are_no_votes_on_the_next_pair(window):
    with voting(3) as (page, sides):
        window.open(page.address)
        shows(window, 3)
        window.run("for (let i = 0; i < 3; i++) document.dispatchEvent(new KeyboardEvent('keydown', {key: '1'}))")
        shows(window, 2)
        assert sides == ["left"]


def test_hostile_prompt_is_shown_as_it_is_and_a_phone_needs_no_scrolling_sideways(window):
    window.show_as(360, 740, "dark")
    with voting(1, HOSTILE) as (page, _):
        window.open(page.address)
        shows(window, 1)
        assert window.text("#prompt") == f"Prompt: {HOSTILE}"
        assert window.run("return typeof window.hacked") == "undefined"
        width, inner = window.run("return [document.documentElement.scrollWidth, innerWidth]")
        assert width <= inner


def test_page_says_that_the_run_has_ended(window):
    with voting(1) as (page, _):
        window.open(page.address)
        shows(window, 1)
        page.vote(page.shown()["number"], "left")
    window.press("1")
    wait_for(lambda: window.text("#status").startswith("No answer from the run"))
