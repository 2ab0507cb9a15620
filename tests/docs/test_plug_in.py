"""What docs/plug-in.md promises: every example runs and trains, and has its line in the table."""

import re
import runpy

import pytest
import torch
from helpers.paths import ROOT
from torch.optim.optimizer import register_optimizer_step_pre_hook

PAGE = (ROOT / "docs" / "plug-in.md").read_text("utf-8")
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "experiments" / "plug_in_examples.py"))
EXAMPLES = SCRIPT["examples"]()
SMALL = {"IMAGES": 8, "POINTS": 16, "NUM_ENVS": 4, "STEPS": 3, "SAMPLES_PER_PROMPT": 2, "MINIBATCH": 6, "ROUND": 8}


def shrunk(code, model):
    """The example with small constants, on another model."""
    for name, value in (SMALL | {"MODEL": str(model)}).items():
        code = re.sub(rf"^{name} = .*$", f"{name} = {value!r}", code, flags=re.MULTILINE)
    return code


@pytest.fixture
def before_training():
    """Every parameter that an optimizer changes, with a copy from before the first change: (parameter, copy) by id."""
    known = {}

    def remember(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and id(parameter) not in known:
                    known[id(parameter)] = (parameter, parameter.detach().clone())

    handle = register_optimizer_step_pre_hook(remember)
    yield known
    handle.remove()


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value encountered")  # TRPO has no critic
@pytest.mark.parametrize("heading", EXAMPLES)
def test_example_trains(heading, micro_pipeline_folder, before_training, capsys):
    if "RLlib" in heading:
        pytest.importorskip("ray")
    names = {"__name__": "__main__"}
    exec(compile(shrunk(EXAMPLES[heading], micro_pipeline_folder), heading, "exec"), names)
    assert len(names["curve"]) >= 2
    assert re.fullmatch(r"-?\d+\.\d{3} -> -?\d+\.\d{3}", capsys.readouterr().out.splitlines()[-1])
    if "TRPO" in heading:  # it has no optimizer
        learned = names["model"].policy.denoiser.named_parameters()
        base = dict(names["model"].policy.model.denoiser.named_parameters())
        pairs = [(now, base.get(name, torch.zeros(()))) for name, now in learned if now.requires_grad]
    else:
        pairs = list(before_training.values())
    assert all(torch.isfinite(now).all() for now, _ in pairs)
    changed = [not torch.equal(now, start.expand_as(now)) for now, start in pairs]
    assert sum(changed) > len(changed) / 2


def test_a_users_own_algorithm_is_short():
    code = EXAMPLES["Your own algorithm"]
    assert "TensorOnPolicyAlgorithm" in code
    assert len(code.splitlines()) < 60


def test_every_example_was_measured_and_every_link_leads_to_one():
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| [\d,]+ \| −?[\d.]+ \| −?[\d.]+ \| \d+ s \|$", PAGE, re.MULTILINE)
    assert rows == list(EXAMPLES)
    assert PAGE.count("\n```python\n") == len(EXAMPLES), "a block is no example, so nothing runs it"
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in EXAMPLES}
    assert set(re.findall(r"\]\(#([\w-]+)\)", PAGE)) == anchors


def test_script_runs_what_is_named_and_says_what_failed(capfd):
    assert list(SCRIPT["chosen"](["torchrl"])) == ["TorchRL"]
    with pytest.raises(ValueError, match="nothing"):
        SCRIPT["chosen"](["nothing"])
    assert SCRIPT["run"]("print('a'); print('1 -> 2')")[0] == "1 -> 2"
    assert SCRIPT["run"]("print('1 -> 2'); raise SystemExit(3)")[0] == "failed: exit 3"
    assert capfd.readouterr().out == "a\n1 -> 2\n1 -> 2\n"
