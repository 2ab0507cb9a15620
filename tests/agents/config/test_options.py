"""Options of a reward, from `key=value` on a command line to the reward's constructor."""

import numpy as np
import pytest
import yaml
from helpers.micro_agents import micro_config, resume_config
from helpers.scripts import MINIATURE, run_script

from agents.config.train_config import TrainConfig, train_config
from agents.planning.plan import describe_plan
from agents.training.preparation import prepare_run, run_training
from ddpo_env import DenoisingEnv, DenoisingVectorEnv
from rewards import configured_reward, parse_options

HERE = __name__


class Scaled:
    """Brightness times a factor; remembers what it was given."""

    def __init__(self, factor=1.0, judge_options=None, device="auto"):
        self.factor = factor
        self.judge_options = judge_options
        self.device = device

    def __call__(self, images, prompts, metadata):
        return self.factor * images.mean(axis=(1, 2, 3)) / 255


class Logging(Scaled):
    """Keeps a line of every call in the folder that it is given."""

    folder = None

    def log_to(self, folder):
        self.folder = self.folder or folder

    def __call__(self, images, prompts, metadata):
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "calls.txt").open("a") as file:
            file.write(f"{len(images)}\n")
        return super().__call__(images, prompts, metadata)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("30", 30),
        ("-0.5", -0.5),
        ("1e-3", 0.001),
        (".inf", float("inf")),
        ("true", True),
        ("no", False),
        ("null", None),
        ("", None),
        ("cuda:1", "cuda:1"),
        ("10:30", "10:30"),
        ("http://localhost:8000/v1?key=a", "http://localhost:8000/v1?key=a"),
        ("The image contains {prompt} # really: yes", "The image contains {prompt} # really: yes"),
        ("[1, 2]", "[1, 2]"),
        ("2001-01-01", "2001-01-01"),
        ("'30'", "30"),
        ('""', ""),
    ],
)
def test_values_are_yaml_scalars(text, value):
    parsed = parse_options([f"key={text}"])
    assert parsed == {"key": value}
    assert type(parsed["key"]) is type(value)


def test_dots_nest_but_not_those_of_a_module():
    pairs = ["judge_options.timeout=30", "judge_options.attempts=2", "device=cpu", "my.rewards:score.model.name=tiny"]
    assert parse_options(pairs) == {
        "judge_options": {"timeout": 30, "attempts": 2},
        "device": "cpu",
        "my.rewards:score": {"model": {"name": "tiny"}},
    }
    assert parse_options([]) == {}


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["device"], "must be key=value pairs.*; got 'device'"),
        (["=cpu"], "must be key=value pairs.*; got '=cpu'"),
        (["a..b=1"], "must be key=value pairs.*; got 'a..b=1'"),
        (["a=1", "a=2"], "must name each key once; a comes again in 'a=2'"),
        (["a.b=1", "a=2"], "must name each key once; a comes again in 'a=2'"),
        (["a=1", "a.b=2"], "must not give a a value and options of its own; got 'a.b=2'"),
    ],
)
def test_wrong_pair_is_quoted(pairs, message):
    with pytest.raises(ValueError, match=f"reward_options {message}"):
        parse_options(pairs)
    with pytest.raises(ValueError, match=f"reward_options {message}"):
        train_config(reward_options=tuple(pairs)).resolved()


def test_options_reach_the_class_and_the_terms_of_a_weighted_sum():
    assert configured_reward(f"{HERE}:Scaled", {"factor": 3}).factor == 3
    both = configured_reward(
        f"{HERE}:Scaled:1:raw,jpeg_compressibility:0", parse_options([f"{HERE}:Scaled.judge_options.timeout=5"])
    )
    assert both.rewards[f"{HERE}:Scaled"].judge_options == {"timeout": 5}
    with pytest.raises(ValueError, match="must begin with a term's name, such as clip_score.device; got device"):
        configured_reward("jpeg_compressibility:1", {"device": "cpu"})
    with pytest.raises(ValueError, match="takes no options .*; got device"):
        configured_reward("jpeg_compressibility", {"device": "cpu"})
    with pytest.raises(ValueError, match="must be among factor, judge_options, device; got factr"):
        configured_reward(f"{HERE}:Scaled", {"factr": 3})


def test_environment_takes_them(micro_pipeline_folder):
    arguments = {"model": micro_pipeline_folder, "device": "cpu", "reward_options": {"factor": 2.0}}
    assert DenoisingVectorEnv(2, reward=f"{HERE}:Scaled", **arguments).reward.factor == 2.0
    assert DenoisingEnv(reward=Scaled, **arguments).batch.reward.factor == 2.0
    with pytest.raises(ValueError, match="takes no options .*; got factor"):
        DenoisingVectorEnv(2, reward=Scaled(), **arguments)


def test_run_has_them_and_a_resumed_one_too(micro_pipeline_folder, tmp_path):
    options = ("factor=2", "judge_options.timeout=5")
    task = {"reward": f"{HERE}:Scaled", "reward_options": options}
    result = run_training(micro_config(micro_pipeline_folder, tmp_path, **task, iterations=1))
    assert result.config.reward_options == options
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert written["reward_options"] == list(options)
    resumed = prepare_run(resume_config(tmp_path, iterations=2))
    assert resumed.config.reward_options == options
    reward = resumed.algorithm.env.denoising_env.reward
    assert (reward.factor, reward.judge_options) == (2, {"timeout": 5})
    del written["reward_options"]
    assert TrainConfig.from_dict(written).reward_options == (), "the default"


def test_plan_shows_them():
    config = train_config(reward="clip_score", reward_options=("model=tiny", "device=cpu")).resolved()
    assert describe_plan(config)[1] == "reward     clip_score: model=tiny, device=cpu"
    config = config.changed(non_finite_rewards="drop")
    assert describe_plan(config)[1].endswith("device=cpu, samples whose score is NaN or infinite are dropped")


def test_command_line_takes_them(micro_pipeline_folder, monkeypatch, capsys, tmp_path):
    run = tmp_path / "run"
    arguments = [*MINIATURE, "--iterations=1", f"--run-dir={run}", f"--reward={HERE}:Logging:2,jpeg_compressibility:1"]
    arguments.append(f"--model={micro_pipeline_folder}")
    options = ["--reward-options", f"{HERE}:Logging.factor=2.5", f"{HERE}:Logging.device=cpu"]
    assert run_script("train_ppo", [*arguments, *options], monkeypatch) == 0
    shown = capsys.readouterr().out
    assert f"{HERE}:Logging.factor=2.5, {HERE}:Logging.device=cpu" in shown
    assert f"{run}/judge " in shown
    calls = (run / "judge" / f"{HERE}-Logging" / "calls.txt").read_text().split()
    assert calls == ["3", "4", "3"], "before, one iteration, after"


@pytest.mark.parametrize(
    ("options", "message"),
    [(["factor"], "got 'factor'"), (["factr=1"], "must be among factor, judge_options, device; got factr")],
)
def test_command_line_refuses_what_is_wrong(monkeypatch, capsys, tmp_path, options, message):
    arguments = [*MINIATURE, f"--run-dir={tmp_path / 'run'}", f"--reward={HERE}:Scaled", "--reward-options", *options]
    assert run_script("train_ppo", arguments, monkeypatch) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_rewards_of_a_run_that_can_log_do(micro_pipeline_folder, tmp_path):
    task = {"reward": f"{HERE}:Logging"}
    run_training(micro_config(micro_pipeline_folder, tmp_path, **task, iterations=1))
    assert (tmp_path / "judge" / "calls.txt").is_file()


@pytest.mark.parametrize("name", ["vlm_vqa", "vlm_alignment"])
def test_judges_log_into_the_folder_of_the_run_unless_they_have_one(tmp_path, name):
    class Silent:
        def ask(self, images, questions):
            return ["two"] * len(images)

        def load(self): ...

        def unload(self): ...

    first = configured_reward(name, {"model": Silent(), "log_per_call": 2})
    second = configured_reward(name, {"model": Silent(), "log_folder": tmp_path / "own"})
    for reward in (first, second):
        reward.log_to(tmp_path / "run")
        if name == "vlm_alignment":
            reward.recall = lambda answers, references: np.zeros(len(answers))
        images = np.zeros((6, 8, 8, 3), np.uint8)
        reward(images, ["a cat"] * 6, [{"questions": ("How many?",), "answers": ("two",)}] * 6)
    assert len(list((tmp_path / "run").glob("*.jpg"))) == 2
    assert len(list((tmp_path / "own").glob("*.jpg"))) == 4
