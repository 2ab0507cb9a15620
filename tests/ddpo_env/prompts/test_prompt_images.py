"""Images in prompt files: where they are, what is refused, and when two are the same."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.prompt_images import picture, prompt_file
from PIL import Image

from ddpo_env.prompts import load_prompts
from ddpo_env.prompts.files import prompt_file_fingerprint
from ddpo_env.prompts.images import describe_image, read_image

EDITS = [("make it red", 0), ("make it blue", 1)]


def write(folder: Path, *entries: object) -> Path:
    path = folder / "edits.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_images_are_relative_to_the_prompt_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt_file(tmp_path / "set", EDITS, answer="yes")
    monkeypatch.chdir(tmp_path)
    prompts = load_prompts(Path("set/edits.jsonl"))
    expected = [(text, {"image": str(tmp_path / f"set/pictures/{seed}.png"), "answer": "yes"}) for text, seed in EDITS]
    assert list(prompts) == expected  # type: ignore[call-overload]


def test_column_of_a_table_names_images_too(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "edits.csv").write_text("prompt,image\nmake it red,a.png\n")
    (prompt,) = load_prompts(tmp_path / "edits.csv")  # type: ignore[misc]
    assert prompt == ("make it red", {"image": str(tmp_path / "a.png")})


def test_either_all_prompts_have_an_image_or_none(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    path = write(tmp_path, {"prompt": "make it red", "image": "a.png"}, {"prompt": "a cat"})
    with pytest.raises(ValueError, match=r"edits.jsonl', line 2 must have an image, because .* line 1 has one"):
        load_prompts(path)
    path = write(tmp_path, "a cat", {"prompt": "make it red", "image": "a.png"})
    with pytest.raises(ValueError, match=r"line 1 must have an image, because .* line 2 has one"):
        load_prompts(path)


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        ("gone.png", "gone.png': there is no such file"),
        ("text.png", "text.png': it is none, or it is damaged"),
        ("cut.png", "cut.png': "),
        ("postscript.eps", "postscript.eps': it is none, or it is damaged"),
        (".", "Is a directory"),
        ("", "must be the path of an image file; got ''"),
        (5, "must be the path of an image file; got 5"),
        (None, "must be the path of an image file; got None"),
        ("https://example.com/a.png", "there is no such file"),
    ],
)
def test_image_that_cannot_be_read_is_named_with_its_line(tmp_path: Path, image: object, problem: str) -> None:
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:-500])
    picture(0).save(tmp_path / "postscript.eps")
    path = write(tmp_path, {"prompt": "one", "image": "a.png"}, {"prompt": "two", "image": image})
    with pytest.raises(ValueError, match="edits.jsonl', line 2: image must be") as caught:
        load_prompts(path)
    assert problem in str(caught.value)


def test_image_is_upright_and_has_three_channels(tmp_path: Path) -> None:
    sideways, exif = picture(0, (40, 30)).convert("RGBA"), Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    sideways.save(tmp_path / "a.png", exif=exif)
    read = read_image(tmp_path / "a.png", "image")
    assert (read.mode, read.size) == ("RGB", (30, 40))
    assert read.tobytes() == picture(0, (40, 30)).transpose(Image.Transpose.ROTATE_270).tobytes()
    assert describe_image(tmp_path / "a.png", "image").size == (30, 40)


def test_content_says_whether_two_images_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture(0).save(path)
    first = describe_image(path, "image")
    assert describe_image(Path(shutil.copy(path, tmp_path / "b.png")), "image") == first
    picture(1).save(path)
    assert describe_image(path, "image") != first
    assert describe_image(picture(0), "image") == describe_image(picture(0), "image") != describe_image(picture(1), "x")


def test_fingerprint_of_a_prompt_file_covers_its_images(tmp_path: Path) -> None:
    path = prompt_file(tmp_path / "here", EDITS)
    before = prompt_file_fingerprint(path)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    assert prompt_file_fingerprint(tmp_path / "there" / "edits.jsonl") == before
    picture(9).save(tmp_path / "here/pictures/1.png")
    assert prompt_file_fingerprint(path) != before
