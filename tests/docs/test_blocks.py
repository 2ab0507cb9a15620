"""Everything that README.md and docs/ show is tried: Python runs, commands are parsed, the rest says why it is not."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.command_lines import UnknownProgramError, try_command
from helpers.pages import INLINE, PAGES, Block, blocks, blocks_of, commands
from helpers.paths import LORA_FILE, ROOT
from helpers.prompt_images import picture
from PIL import Image

SMALLER = {
    "README.md": {
        "iterations=20": "iterations=1, samples_per_iteration=4, eval_samples=2",
        ".learn(1600)": ".learn(16)",
        '"num_envs": 16, "num_inference_steps": 10, "samples_per_prompt": 8': (
            '"num_envs": 4, "num_inference_steps": 4, "samples_per_prompt": 2'
        ),
        '"n_steps": 10, "batch_size": 40': '"n_steps": 4, "batch_size": 8',
        "num_envs=64": "num_envs=2",
    },
    "own-model.md": {
        "from diffusers import FluxKontextPipeline": (
            "from helpers.more_families import build\nfrom helpers.prompt_images import KONTEXT"
        ),
        'FluxKontextPipeline.from_pretrained("black-forest-labs/FLUX.1-Kontext-dev")': 'build("flux_kontext")',
        '{"image": image}': '{"image": image} | KONTEXT',
        "prompts=prompts": "prompts=prompts, pipeline_arguments=KONTEXT",
    },
    "training.md": {
        "iterations=20": "iterations=1, samples_per_iteration=4, eval_samples=2",
        "black-forest-labs/FLUX.1-Kontext-dev": "tiny",
        "my_rewards:answers": "my_rewards:redness",
        "clip_score.model=folder": "clip_score.model=tiny",
        "cuda:1": "cpu",
    },
    "rewards.md": {"cuda:0": "cpu"},
}
"""What takes long, or needs a GPU or the Hub, and what stands in its place."""

TRIED_BY = {"plug-in.md": "test_plug_in.py"}
"""Pages whose Python has a test file of its own: each example there is a program."""
TRIED = ("bash", "console", "text", INLINE)
ALL = [block for page in PAGES for block in blocks(page)]
WITH_PYTHON = sorted({block.page for block in ALL if block.language == "python"} - TRIED_BY.keys())
WITH_COMMANDS = [block for block in ALL if block.language in TRIED and commands(block)]


def smaller(page: str, code: str) -> str:
    """Return code or a command of a page that is quick, offline and needs no GPU."""
    for large, small in SMALLER.get(page, {}).items():
        code = code.replace(large, small)
    return code


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in a folder with what a reader has: the clone, and the files that the pages speak of."""
    for name in ("ddpo_env", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("car.png", "street.png", "photos/car.png", "photos/street.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(0).save(tmp_path / name)
    lines = [block.code for block in ALL if block.language == "json"]
    (tmp_path / "edits.jsonl").write_text("".join(lines))
    reward = re.search(r"def redness.*?\n\n", "".join(block.code for block in ALL if block.page == "README.md"), re.S)
    assert reward is not None
    (tmp_path / "my_rewards.py").write_text(reward[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("my_rewards", None)  # other tests have a module of this name


def check_readme(names: dict[str, Any]) -> None:
    assert np.asarray(Image.open("fox.png")).shape == (64, 64, 3)
    assert any("lora" in name for name in names["pipe"].unet.state_dict())
    assert Path("runs/first/lora", LORA_FILE).is_file()
    assert names["image"].shape == (64, 64, 3)
    assert names["reward"] < 0


def check_algorithms(names: dict[str, Any]) -> None:
    algorithm = names["algorithm"]
    assert (algorithm.n_steps, algorithm.num_timesteps) == (4, 32)
    assert Path("nft_lora", LORA_FILE).is_file()


def check_doctor(names: dict[str, Any]) -> None:
    from agents.commands.doctor.checks import CHECKS

    assert [finding.name for finding in names["findings"]] == list(CHECKS)
    assert "red" not in {finding.level for finding in names["findings"]}
    assert [path.name for path in Path("doctor").iterdir()] == ["points"]


def check_environment(names: dict[str, Any]) -> None:
    assert names["terminations"].all()
    assert (names["rewards"] < -1).all(), "an image of noise takes more than 1 kB"


def check_own_model(names: dict[str, Any]) -> None:
    from agents import DiffusionPolicy
    from ddpo_env import DiffusionModel

    assert names["before"] < 0.5
    assert names["after"] > 0.9
    model, policy = names["model"], names["algorithm"].policy
    assert isinstance(model, DiffusionModel)
    policy.save("robot")
    loaded = DiffusionPolicy.load("robot", model=model).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in policy.state_dict().items())
    assert names["ADAPTERS"]["DDIMPipeline"]


def check_rewards(names: dict[str, Any]) -> None:
    from rewards import (
        StatefulReward,
        check_differentiable,
        combine_measurements,
        evaluate_reward,
        measure_reward,
        score_with_gradient,
    )

    reddish = np.zeros((2, 8, 8, 3), np.uint8)
    reddish[0, ..., 0] = 200
    scores, details = evaluate_reward(names["warmth"], reddish, ["a cat", "a dog"], [{}] * 2)
    assert scores.tolist() == details["red"] == [200, 0]
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    whole, apart = names["Novelty"](), names["Novelty"]()
    assert isinstance(whole, StatefulReward)
    for _ in range(2):
        expected, _ = evaluate_reward(whole, images, ["a cat"] * 4, [{}] * 4)
        processes = [measure_reward(apart, images[rows], ["a cat"] * 2, [{}] * 2) for rows in (slice(2), slice(2, 4))]
        measurements = [one for measured, _ in processes for one in measured]
        scores, _ = combine_measurements(apart, measurements, {}, ["a cat"] * 4, "raise")
        np.testing.assert_array_equal(scores, expected)
    colours = images.mean(axis=(1, 2))
    np.testing.assert_allclose(scores, np.linalg.norm(colours - colours.mean(axis=0), axis=1))
    redness = check_differentiable(names["Redness"]())
    samples = (torch.as_tensor(images).movedim(-1, 1) / 255).requires_grad_()
    differentiated = score_with_gradient(redness, samples, ["a cat"] * 4)
    plain, _ = evaluate_reward(redness, images, ["a cat"] * 4, [{}] * 4)
    np.testing.assert_allclose(differentiated.detach(), plain, rtol=1e-5)


def check_tiny_judges(names: dict[str, Any]) -> None:
    assert names["answers"] == ["a fox riding a bike"]


def check_training(names: dict[str, Any]) -> None:
    assert names["longer"].iterations == 40
    assert Path("runs/first/lora").is_dir()
    assert not Path("runs/longer").exists()


PROMISED: dict[str, Callable[[dict[str, Any]], None]] = {
    "README.md": check_readme,
    "algorithms.md": check_algorithms,
    "doctor.md": check_doctor,
    "environment.md": check_environment,
    "own-model.md": check_own_model,
    "rewards.md": check_rewards,
    "tiny-judges.md": check_tiny_judges,
    "training.md": check_training,
}
"""What must be true after a page's Python has run."""


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_of_a_page_runs(page: str, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page are one program, in order."""
    from ddpo_env import models

    monkeypatch.setattr(models, "ADAPTERS", dict(models.ADAPTERS))
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in ALL:
        if (block.page, block.language) == (page, "python"):
            code = compile("\n" * block.line + smaller(page, block.code), page, "exec")
            if block.reason is None:
                exec(code, names)
    if page in PROMISED:
        PROMISED[page](names)


@pytest.mark.parametrize("block", WITH_COMMANDS, ids=str)
def test_commands_are_accepted(block: Block, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in commands(block):
        try:
            try_command([smaller(block.page, word) for word in words], monkeypatch)
        except UnknownProgramError:
            assert block.reason is not None, f"{words} needs <!-- not run: reason -->"


def test_every_block_is_accounted_for() -> None:
    for block in ALL:
        assert block.reason or block.language in (*TRIED, "python", "json", "yaml"), block
        if block.language == "yaml":
            assert yaml.safe_load(block.code)
        if block.language == "json":
            assert [json.loads(line) for line in block.code.splitlines()]


@pytest.mark.parametrize(
    "command",
    [
        "ddpo-train --shared-noise True",  # was shown; the flag takes no value
        "OMP_NUM_THREADS=1 torchrun --nproc-per-node=2 scripts/train_ppo.py --reward jpg",
        "python scripts/evaluate.py --lora runs/first/lora --reward aesthetic",
        "python scripts/experiments/algorithms.py --seed=one",
        'pip install -c constraints.txt -e ".[tests]"',
        "pytest -m slow tests/test_nothing.py",
        "vllm serve model",
    ],
)
def test_wrong_commands_are_found(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (words,) = commands(Block("page.md", 1, "bash", command, None))
    with pytest.raises((SystemExit, AssertionError, UnknownProgramError)):
        try_command(words, monkeypatch)


def test_blocks_of_a_page_are_found_wherever_they_stand() -> None:
    text = """
<!-- not run: it costs money -->
```bash
rent gpu  # per hour
```

1. Say `ddpo-train --dry-run`, not `ddpo-train`:

   ```console
   $ ddpo-train \\
       --seed 1 && ls
   green
   ```

| `pip install x` |
| --- |
"""
    found = list(blocks_of("page.md", text))
    assert [(block.language, block.reason) for block in found] == [
        ("bash", "it costs money"),
        (INLINE, None),
        ("console", None),
        (INLINE, None),
    ]
    shown = [words for block in found for words in commands(block)]
    assert shown[:2] == [["rent", "gpu"], ["ddpo-train", "--dry-run"]]
    assert shown[2:] == [["ddpo-train", "--seed", "1"], ["ls"], ["pip", "install", "x"]]
