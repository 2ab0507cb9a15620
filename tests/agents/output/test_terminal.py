"""What commands print: nothing controls the terminal, and no encoding ends a program."""

import subprocess
import sys
from pathlib import Path

import pytest

from agents.output.terminal import escaped, print_error, print_line, quoted, run_command


def test_control_characters_are_written_out(capsys: pytest.CaptureFixture[str]) -> None:
    print_line("a\x1b[2Jb\u202ec\r")
    assert capsys.readouterr().out == "a\\x1b[2Jb\\u202ec\\r\n"
    assert escaped("two\nlines\tand ε → 猫") == "two\nlines\tand ε → 猫"


def test_errors_show_markup_and_emoji_codes_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_error("no folder '[/x]' or [b]out[/b] :smile:\x1b]0;title\x07")
    assert capsys.readouterr().err == "error: no folder '[/x]' or [b]out[/b] :smile:\\x1b]0;title\\x07\n"


def test_commands_are_quoted_to_be_pasted() -> None:
    assert quoted("ddpo-sample", "--lora", "my run/$(x)") == "ddpo-sample --lora 'my run/$(x)'"


def test_faults_of_the_program_itself_keep_their_traceback(tmp_path: Path) -> None:
    def fail() -> None:
        raise KeyError("a fault")

    with pytest.raises(KeyError, match="a fault"):
        run_command(fail, tmp_path)


def test_any_text_is_printed_in_any_encoding() -> None:
    code = "from agents.output.terminal import *; tolerate_encodings(); print_line('ε → 猫'); print_error('\\udcff ε')"
    environment = {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert done.stdout == b"? ? ?\n"
    assert b"ud" in done.stderr
