"""Files that are written whole or not at all, on any system, and never through a link."""

import errno
import os
import sys
from pathlib import Path

import pytest

from agents.output.files import check_writable, refuse_links, write_file, write_folder, write_new_folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_text_is_utf_8_whatever_the_locale(tmp_path, monkeypatch):
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "cp1252")
    write_file(tmp_path / "text", "ε → π")
    assert (tmp_path / "text").read_bytes() == "ε → π".encode()


@pytest.mark.skipif(sys.platform == "win32", reason="needs fcntl")
def test_flushing_uses_a_writable_handle_as_windows_demands(tmp_path, monkeypatch):
    import fcntl

    flushed = []

    def windows(handle):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flushed.append(handle)

    monkeypatch.setattr(os, "fsync", windows)
    write_file(tmp_path / "file", b"whole")
    write_folder(tmp_path / "folder", lambda empty: (empty / "one").write_bytes(b"1"))
    assert len(flushed) == 2


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    def full_disk(path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    write_file(tmp_path / "file", "old")
    with pytest.raises(OSError, match="No space left"):
        write_file(tmp_path / "file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_folder(tmp_path, lambda empty: full_disk(empty / "file"))
    with pytest.raises(OSError, match="No space left"):
        write_new_folder(tmp_path / "new", lambda empty: full_disk(empty / "file"))
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_new_folder_appears_whole_and_replaces_nothing(tmp_path):
    def write(folder):
        (folder / "a").write_text("a")
        assert not (tmp_path / "new").exists()

    write_new_folder(tmp_path / "new", write)
    assert names(tmp_path / "new") == ["a"]
    (tmp_path / "late" / "b").mkdir(parents=True)
    with pytest.raises(OSError, match="not empty"):
        write_new_folder(tmp_path / "late", lambda empty: (empty / "a").touch())
    assert names(tmp_path / "late") == ["b"]
    assert names(tmp_path) == ["late", "new"]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder in which nobody can write")
@pytest.mark.parametrize(("path", "kind"), [("/proc/x.png", "file"), ("/proc/some/folder", "folder")])
def test_place_that_cannot_be_written_is_named_before_the_work(path, kind):
    with pytest.raises(ValueError, match=f"output must be a {kind} that can be written; '/proc' is not; got '{path}'"):
        check_writable("output", Path(path), kind)


def test_check_of_a_place_leaves_nothing(tmp_path):
    (tmp_path / "old").write_text("old")
    check_writable("output", tmp_path / "old", "file")
    check_writable("output", tmp_path / "new" / "folder" / "file", "file")
    check_writable("output", tmp_path, "folder")
    with pytest.raises(ValueError, match="output must be a folder that can be written; .*old' is not"):
        check_writable("output", tmp_path / "old" / "folder", "folder")
    assert names(tmp_path) == ["old"]
    assert (tmp_path / "old").read_text() == "old"


def test_link_in_place_of_a_file_is_replaced_and_of_a_folder_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_text("precious")
    (tmp_path / "run" / "file").symlink_to(tmp_path / "outside" / "precious")
    (tmp_path / "run" / "samples").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match=r"must not contain links.*'.*/run/(file|samples)' is one"):
        refuse_links(tmp_path / "run")
    write_file(tmp_path / "run" / "file", "new")
    with pytest.raises(OSError, match="is or became a link"):
        write_file(tmp_path / "run" / "samples" / "precious", "new")
    assert (tmp_path / "outside" / "precious").read_text() == "precious"
    assert names(tmp_path / "outside") == ["precious"]
    assert not (tmp_path / "run" / "file").is_symlink()
