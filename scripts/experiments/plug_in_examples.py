"""Run the examples of docs/plug-in.md, each in a process of its own, and print their results as a table."""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "plug-in.md"


def examples() -> dict[str, str]:
    """Return the code of each example by its heading."""
    sections = re.split(r"^## ", PAGE.read_text("utf-8"), flags=re.MULTILINE)[1:]
    blocks = {text.partition("\n")[0]: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for text in sections}
    return {heading: found[0] for heading, found in blocks.items() if found}


def chosen(names: list[str]) -> dict[str, str]:
    """Return the examples whose heading contains one of the names, in any case; without names, all examples.

    Raises:
        ValueError: for a name that no heading contains.
    """
    known = examples()
    for name in names:
        if not any(name.lower() in heading.lower() for heading in known):
            raise ValueError(f"name must be part of one of {', '.join(known)}; got {name!r}")
    return {
        heading: code
        for heading, code in known.items()
        if not names or any(name.lower() in heading.lower() for name in names)
    }


def run(code: str) -> tuple[str, float]:
    """Run an example in a process of its own.

    Returns:
        Its last line, `first -> last`, or how it failed, and the seconds that it took.
    """
    started = time.perf_counter()
    last = ""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    return last if process.returncode == 0 else f"failed: exit {process.returncode}", time.perf_counter() - started


def main() -> int:
    """Parse the command line, run the examples, and print the table; return 1 if an example failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of the headings of the examples to run; default: all")
    try:
        selected = chosen(parser.parse_args().names)
    except ValueError as error:
        parser.error(str(error))
    rows = []
    for heading, code in selected.items():
        print(f"\n{heading}", flush=True)
        result, seconds = run(code)
        rows.append((heading, result, seconds))
    print("\n| example | first -> last | seconds |\n| --- | --- | --- |")
    for heading, result, seconds in rows:
        print(f"| {heading} | {result} | {seconds:.0f} |")
    return int(any(result.startswith("failed") for _, result, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
