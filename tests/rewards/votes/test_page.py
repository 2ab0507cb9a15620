"""The server of the voting page: who is let in, what counts as a vote."""

import base64
import http.client
import io
import json
import socket

import numpy as np
import pytest
from helpers.votings import HOSTILE, pairs, voting
from PIL import Image

from rewards.votes.page import VotingPage


def request(page, method, path, body=None, host=None):
    """Send a request below the page's address; return status, headers and content."""
    _, _, place, token, _ = page.address.split("/")
    connection = http.client.HTTPConnection(place, timeout=10)
    headers = {"Host": host or place}
    connection.request(method, path.replace("TOKEN", token), body, headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), content


def cast(page, **vote):
    return request(page, "POST", "/TOKEN/vote", json.dumps(vote))


def test_without_the_token_or_under_another_name_everything_is_refused():
    with voting(1) as (page, sides):
        vote = json.dumps({"number": page.shown()["number"], "winner": "left"})
        for path in ("/", "/pair", "/vote", "/wrong/", "/wrong/pair", "/wrong/vote", "//pair", "/é/pair", "/TOKEN"):
            for method in ("GET", "POST"):
                status, _, content = request(page, method, path.replace("é", "%C3%A9"), vote)
                assert status == 403, path
                assert b"image" not in content
        for host in ("evil.example", "127.0.0.1", "127.0.0.1:1", f"evil.example:{page.address.split(':')[2]}"):
            assert request(page, "POST", "/TOKEN/vote", vote, host=host)[0] == 403
        assert not sides
        assert len(page.address.split("/")[3]) >= 32
        with voting(1) as (other, _):
            assert page.address.split("/")[3] != other.address.split("/")[3]


def test_page_is_on_loopback_only_and_allows_no_foreign_content():
    with voting(1) as (page, _):
        assert page._server.server_address[0] == "127.0.0.1"
        status, headers, content = request(page, "GET", "/TOKEN/")
        assert status == 200
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert headers["Referrer-Policy"] == "no-referrer"
        assert b"http" not in content
        for name in ("votes.css", "votes.js"):
            assert request(page, "GET", f"/TOKEN/{name}")[0] == 200
        for path in ("votes.html", "../page.py", "data/votes.js"):
            assert request(page, "GET", f"/TOKEN/{path}")[0] == 404


def test_vote_counts_once_and_only_for_the_pair_that_is_shown():
    with voting(2, HOSTILE) as (page, sides):
        shown = json.loads(request(page, "GET", "/TOKEN/pair")[2])
        assert shown["prompt"] == HOSTILE
        assert shown["question"] == "Which is better?"
        assert shown["left"].startswith("data:image/png;base64,")
        status, _, content = cast(page, number=shown["number"], winner="right")
        assert (status, json.loads(content)["open"]) == (200, 1)
        assert cast(page, number=shown["number"], winner="left")[0] == 409
        assert sides == ["right"]
        wrong = [{}, {"number": 1}, {"number": "1", "winner": "left"}, {"number": True, "winner": "left"}]
        for vote in [*wrong, {"number": 1, "winner": "both"}, {"number": 1, "winner": ["left"]}]:
            assert cast(page, **vote)[0] == 400
        for body in ("", "null", "[" * 900, "x" * 2000):
            assert request(page, "POST", "/TOKEN/vote", body)[0] == 400
        assert sides == ["right"]


def test_pairs_of_a_new_batch_take_the_place_of_those_that_are_open():
    page, sides = VotingPage("Which is better?", 0), []

    def note(comparison, side):
        sides.append((comparison, side))

    first, second = pairs(2), pairs(1)
    page.ask(first, note, 0.0)
    old = page.shown()["number"]
    page.ask(second, note, 0.0)
    assert not page.vote(old, "left")
    assert page.vote(page.shown()["number"], "left")
    assert sides == [(second[0], "left")]
    page.close()


def test_vote_that_cannot_be_kept_leaves_the_pair_open(capsys):
    page = VotingPage("Which is better?", 0)

    def full(comparison, side):
        raise OSError("no space left")

    page.ask(pairs(1), full, 0.0)
    assert cast(page, number=page.shown()["number"], winner="left")[0] == 500
    assert "a vote cannot be kept: no space left" in capsys.readouterr().err
    assert page.shown()["open"] == 1
    page.close()


def test_taken_port_is_an_error_before_the_run():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        page = VotingPage("Which is better?", port)
        with pytest.raises(ValueError, match=f"port must be free .* got {port}"):
            page.open()


def test_image_is_shown_pixel_for_pixel():
    with voting(1) as (page, _):
        content = base64.b64decode(page.shown()["right"].partition(",")[2])
        np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(content))), np.full((8, 8, 3), 200))
