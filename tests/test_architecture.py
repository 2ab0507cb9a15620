"""The shape of the code base: imports go one way and without a circle, folders and files stay small.

Imports are read from the source, so those inside functions and under `TYPE_CHECKING` count too.
"""

import ast
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from helpers.paths import ROOT

LIBRARY = ("agents", "ddpo_env", "rewards")
LAYERS = ("scripts", *LIBRARY)
"""Each package imports only itself and those after it."""
_LIBRARY = ("planning", "config", "algorithms", "evaluation", "policy", "rollout", "distributed", "output")
_BELOW_TRAINING = {*_LIBRARY, "report"}
ROOMS = {
    "commands": {"training", *_BELOW_TRAINING},
    "training": _BELOW_TRAINING,
    "report": {"config", "evaluation", "output"},
    "planning": {"config", "algorithms", "policy", "rollout", "distributed", "output"},
    "config": {"algorithms", "policy", "rollout", "distributed", "output"},
    "algorithms": {"policy", "rollout", "distributed"},
    "evaluation": {"policy", "rollout", "distributed", "output"},
    "policy": {"rollout", "distributed", "output"},
    "rollout": {"distributed"},
    "distributed": set(),
    "output": set(),
}
"""The rooms of `agents`, and what each may import."""
MOST_ENTRIES, MOST_ROOMS, MOST_LINES = 12, 12, 400


def source_files(root: Path, packages: Iterable[str]) -> list[Path]:
    """Python files of packages, relative to the root."""
    return sorted(path.relative_to(root) for package in packages for path in (root / package).rglob("*.py"))


def folders(root: Path, packages: Iterable[str]) -> list[Path]:
    """Folders of packages without those of data, relative to the root."""
    found = [path for package in packages for path in ((root / package), *(root / package).rglob("*"))]
    relative = [path.relative_to(root) for path in found if path.is_dir()]
    return sorted(path for path in relative if not {"__pycache__", "data"} & set(path.parts))


def imported_names(file: Path, package: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Dotted names that a file of a package imports, split; `from a import b` may mean `a.b` or a name in `a`."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            for alias in node.names:
                yield (*start, *(node.module.split(".") if node.module else ()), alias.name)


def import_graph(root: Path, packages: Iterable[str]) -> dict[str, set[str]]:
    """Files and the files that they import; a name from a package is an import of the package's `__init__`.

    A script finds its neighbours by their bare names, those of its own folder first.
    """
    files = source_files(root, packages)
    known = {file.with_suffix("").parts: str(file) for file in files}
    known |= {file.parent.parts: str(file) for file in files if file.name == "__init__.py"}
    bare = {(file.stem,): str(file) for file in files if file.parts[0] == "scripts"}
    graph: dict[str, set[str]] = {str(file): set() for file in files}
    for file in files:
        package = file.parent.parts
        for name in imported_names(root / file, package):
            places = [name, name[:-1]] if package[0] != "scripts" else [name, name[:-1], package + name[:1]]
            found = next((known[place] for place in places if place in known), None)
            if found is None and package[0] == "scripts":
                found = bare.get(name[:1])
            if found not in (None, str(file)):
                graph[str(file)].add(str(found))
    return graph


def circle(graph: dict[str, set[str]]) -> str:
    """An import circle, as text; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " is imported by ".join(error.args[1])
    return ""


def wrong_directions(graph: dict[str, set[str]]) -> list[str]:
    """Imports from a package or a room of `agents` to one that is above it."""
    wrong = []
    for file, imports in graph.items():
        for other in imports:
            package, target = Path(file).parts[0], Path(other).parts[0]
            if LAYERS.index(package) > LAYERS.index(target):
                wrong.append(f"{file} imports {other}: {target} is above {package}")
            elif package == target == "agents":
                room, entered = (Path(path).with_suffix("").parts[1] for path in (file, other))
                if room not in ("__init__", entered) and entered not in ROOMS[room]:
                    wrong.append(f"{file} imports {other}: {room} must not import {entered}")
    return sorted(wrong)


def room_graph(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The rooms of a package, its folders and the files beside them, and the rooms that their files import."""
    rooms: dict[str, set[str]] = {}
    for file, imports in graph.items():
        room, *entered = (Path(path).with_suffix("").parts[1] for path in (file, *imports))
        if room != "__init__":
            rooms.setdefault(room, set()).update(set(entered) - {room, "__init__"})
    return rooms


def unknown_rooms(root: Path) -> set[str]:
    """Folders and files of `agents` whose place among the rooms nobody has said."""
    return {path.stem for path in entries(root / "agents")} - {"__init__"} - ROOMS.keys()


def entries(folder: Path) -> list[Path]:
    """What a reader of a folder has to choose from; `py.typed` is an empty mark for type checkers."""
    hidden = {"__pycache__", "py.typed"}
    return [path for path in folder.iterdir() if path.name not in hidden and not path.name.startswith(".")]


def crowded(root: Path, packages: Iterable[str]) -> list[str]:
    """Folders with more entries than a reader can survey."""
    counts = {str(folder): len(entries(root / folder)) for folder in folders(root, packages)}
    return [
        f"{folder} has {count} entries"
        for folder, count in counts.items()
        if count > (MOST_ROOMS if folder == "agents" else MOST_ENTRIES)
    ]


def undescribed(root: Path, packages: Iterable[str]) -> list[str]:
    """Folders without an `__init__` that says what they are for."""
    files = [folder / "__init__.py" for folder in folders(root, packages)]
    return [
        str(file)
        for file in files
        if not (root / file).exists() or not ast.get_docstring(ast.parse((root / file).read_text("utf-8")))
    ]


def long_files(root: Path, packages: Iterable[str]) -> list[str]:
    lines = {str(file): len((root / file).read_text("utf-8").splitlines()) for file in source_files(root, packages)}
    return [f"{file} has {count} lines" for file, count in lines.items() if count > MOST_LINES]


def imports_of_tests(root: Path) -> list[str]:
    """Files of `tests/` that import from a test file."""
    files = source_files(root, ["tests"])
    tests = {file.stem for file in files if file.name.startswith("test_")}
    return [
        f"{file} imports {'.'.join(name)}"
        for file in files
        for name in imported_names(root / file, file.parent.parts)
        if tests & set(name)
    ]


@pytest.mark.parametrize("package", LAYERS)
def test_files_do_not_import_each_other_in_a_circle(package):
    graph = import_graph(ROOT, [package])
    assert len(graph) > 5
    assert circle(graph) == ""


@pytest.mark.parametrize("package", LIBRARY)
def test_rooms_do_not_import_each_other_in_a_circle(package):
    rooms = room_graph(import_graph(ROOT, [package]))
    assert len(rooms) > 5
    assert circle(rooms) == ""


def test_imports_go_one_way():
    graph = import_graph(ROOT, LAYERS)
    assert sum(len(imports) for imports in graph.values()) > 100
    assert wrong_directions(graph) == []


def test_every_room_of_agents_has_its_place():
    assert unknown_rooms(ROOT) == set()


def test_folders_can_be_surveyed():
    assert crowded(ROOT, LIBRARY) == []


def test_every_folder_says_what_it_is_for():
    assert undescribed(ROOT, LIBRARY) == []


def test_files_have_one_subject():
    assert long_files(ROOT, LIBRARY) == []


def test_no_test_file_imports_from_another():
    assert imports_of_tests(ROOT) == []


@pytest.fixture
def tree(tmp_path):
    """Write files, given by their path and text, and return the root."""

    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


@pytest.mark.parametrize(
    "text",
    [
        "import rewards.jpeg.pixels",
        "import numpy, rewards.jpeg.pixels as pixels",
        "from rewards.jpeg import pixels",
        "from rewards.jpeg.pixels import size",
        "from rewards.jpeg.pixels import *",
        "from .jpeg import pixels",
        "from .jpeg.pixels import size",
        "def late():\n    from rewards.jpeg.pixels import size",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from rewards.jpeg.pixels import size",
    ],
)
def test_every_way_to_import_a_file_is_found(tree, text):
    root = tree({"rewards/a.py": text, "rewards/jpeg/__init__.py": "", "rewards/jpeg/pixels.py": ""})
    assert import_graph(root, ["rewards"])["rewards/a.py"] == {"rewards/jpeg/pixels.py"}


@pytest.mark.parametrize("text", ["from rewards import load", "import rewards", "from . import load"])
def test_name_of_a_package_is_an_import_of_its_init(tree, text):
    root = tree({"rewards/a.py": text, "rewards/__init__.py": "from rewards.a import other"})
    graph = import_graph(root, ["rewards"])
    assert graph == {"rewards/a.py": {"rewards/__init__.py"}, "rewards/__init__.py": {"rewards/a.py"}}
    assert circle(graph)


def test_relative_import_in_an_init_stays_in_its_folder(tree):
    files = {"rewards/clip/__init__.py": "from .score import x\nfrom ..jpeg import y", "rewards/clip/score.py": ""}
    root = tree(files | {"rewards/jpeg.py": ""})
    expected = {"rewards/clip/score.py", "rewards/jpeg.py"}
    assert import_graph(root, ["rewards"])["rewards/clip/__init__.py"] == expected


def test_scripts_are_found_by_their_bare_names(tree):
    files = {"scripts/benchmarks/a.py": "import figures\nfrom points import x", "scripts/benchmarks/figures.py": ""}
    files |= {"scripts/experiments/figures.py": "", "scripts/experiments/points.py": "import torch"}
    graph = import_graph(tree(files), ["scripts"])
    assert graph["scripts/benchmarks/a.py"] == {"scripts/benchmarks/figures.py", "scripts/experiments/points.py"}
    assert graph["scripts/experiments/points.py"] == set()


def test_circle_is_told(tree):
    root = tree({"rewards/a.py": "import rewards.b", "rewards/b.py": "def f():\n    import rewards.c"})
    assert circle(import_graph(root, ["rewards"])) == ""
    tree({"rewards/c.py": "from rewards.a import x"})
    shown = circle(import_graph(root, ["rewards"]))
    assert all(f"rewards/{name}.py" in shown for name in "abc")
    assert shown.count(" is imported by ") == 3


def test_circle_of_rooms_without_a_circle_of_files_is_told(tree):
    files = {"rewards/clip/a.py": "import rewards.judge.a", "rewards/judge/a.py": "", "rewards/judge/b.py": ""}
    root = tree(files)
    assert room_graph(import_graph(root, ["rewards"])) == {"clip": {"judge"}, "judge": set()}
    graph = import_graph(tree({"rewards/judge/b.py": "import rewards.clip.a"}), ["rewards"])
    assert circle(graph) == ""
    assert circle(room_graph(graph))


def test_imports_of_what_is_above_are_told(tree):
    files = {
        "rewards/a.py": "import ddpo_env.env",
        "ddpo_env/env.py": "import rewards.a",
        "agents/__init__.py": "from agents.training.run import run",
        "agents/distributed.py": "",
        "agents/training/run.py": "import ddpo_env.env, agents.distributed, agents.training.build",
        "agents/training/build.py": "",
        "agents/rollout/buffer.py": "import agents.distributed\ndef f():\n    from agents.training.run import run",
        "agents/policy/lora.py": "from agents import run",
        "scripts/train.py": "import agents.training.run, rewards.a",
        "ddpo_env/models.py": "import scripts.train",
    }
    assert wrong_directions(import_graph(tree(files), LAYERS)) == [
        "agents/policy/lora.py imports agents/__init__.py: policy must not import __init__",
        "agents/rollout/buffer.py imports agents/training/run.py: rollout must not import training",
        "ddpo_env/models.py imports scripts/train.py: scripts is above ddpo_env",
        "rewards/a.py imports ddpo_env/env.py: ddpo_env is above rewards",
    ]


def test_rooms_form_no_circle_and_a_new_one_must_be_placed(tree):
    assert circle(ROOMS) == ""
    assert all(allowed <= ROOMS.keys() for allowed in ROOMS.values())
    root = tree({"agents/py.typed": "", "agents/__init__.py": "", "agents/rollout/a.py": "", "agents/attention.py": ""})
    assert unknown_rooms(root) == {"attention"}


def test_crowded_folders_are_told_and_data_is_not_looked_into(tree):
    full = {f"rewards/clip/{number}.py": "" for number in range(12)}
    root = tree(full | {f"rewards/data/{number}.txt": "" for number in range(20)} | {"rewards/__pycache__/a.pyc": ""})
    tree({"rewards/clip/__pycache__/a.pyc": "", "rewards/clip/.hidden": ""} | {f"agents/{n}.py": "" for n in range(12)})
    assert crowded(root, ["agents", "rewards"]) == []
    tree({"rewards/clip/data/weights.bin": "", "agents/more/a.py": ""})
    assert crowded(root, ["agents", "rewards"]) == ["agents has 13 entries", "rewards/clip has 13 entries"]


def test_folders_without_a_docstring_are_told(tree):
    files = {
        "rewards/__init__.py": '"""Scores."""',
        "rewards/clip/__init__.py": "import torch",
        "rewards/judge/a.py": "",
    }
    root = tree(files | {"rewards/data/a.txt": ""})
    assert undescribed(root, ["rewards"]) == ["rewards/clip/__init__.py", "rewards/judge/__init__.py"]


def test_long_files_are_told(tree):
    root = tree({"rewards/a.py": "\n" * 400, "rewards/b.py": "\n" * 401})
    assert long_files(root, ["rewards"]) == ["rewards/b.py has 401 lines"]


def test_imports_of_tests_are_told(tree):
    files = {"tests/helpers/a.py": "", "tests/agents/test_a.py": "from helpers.a import x\nimport agents.policy"}
    assert imports_of_tests(tree(files)) == []
    files = {
        "tests/test_b.py": "from agents.test_a import x",
        "tests/helpers/b.py": "def f():\n    from . import test_b",
    }
    assert imports_of_tests(tree(files)) == [
        "tests/helpers/b.py imports tests.helpers.test_b",
        "tests/test_b.py imports agents.test_a.x",
    ]
