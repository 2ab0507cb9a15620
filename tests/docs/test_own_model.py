"""What docs/own-model.md promises: the robot's four pieces are a file that learns, and an adapter is one line."""

import re

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from helpers.micro_families import micro_family
from helpers.paths import ROOT

from agents import DiffusionPolicy
from ddpo_env import DiffusionModel, models

ROBOT, FAMILY = (ROOT / "docs" / "own-model.md").read_text("utf-8").split("## A pipeline is its own adapter")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def test_robot_learns_to_walk_around_the_pillar(capsys, tmp_path):
    pieces = BLOCK.findall(ROBOT)
    assert len(pieces) == 4
    names = {"__name__": "__main__"}
    exec(compile("\n".join(pieces), "own-model.md", "exec"), names)
    assert names["before"] < 0.5
    assert names["after"] > 0.9
    assert re.fullmatch(r"\d+% -> \d+% of the plans arrive.*\n", capsys.readouterr().out)
    model, policy = names["model"], names["algorithm"].policy
    assert isinstance(model, DiffusionModel)
    policy.save(tmp_path)
    loaded = DiffusionPolicy.load(tmp_path, model=model)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in policy.state_dict().items())


def test_table_names_every_member():
    members = re.findall(r"^\| `(\w+)", ROBOT, re.MULTILINE)
    promised = {name for name in {*vars(DiffusionModel), *DiffusionModel.__annotations__} if not name.startswith("_")}
    assert set(members) == promised
    assert len(members) == 9


def test_family_from_outside_is_one_line(monkeypatch):
    monkeypatch.setitem(models.ADAPTERS, "DDIMPipeline", "")  # so that the line below is taken back at the end
    del models.ADAPTERS["DDIMPipeline"]
    pipeline = DDIMPipeline(micro_family("ddpm").unet, DDIMScheduler())
    with pytest.raises(ValueError, match="a DDIMPipeline has unet, scheduler"):
        models.load_model(pipeline, "cpu")
    exec(BLOCK.findall(FAMILY)[-1], {})
    assert models.load_model(pipeline, "cpu").latent_shape == (3, 16, 16)


@pytest.mark.parametrize("link", re.findall(r"\]\((\.\./[^)]+)\)", ROBOT + FAMILY))
def test_links_lead_somewhere(link):
    assert (ROOT / "docs" / link).is_file()
