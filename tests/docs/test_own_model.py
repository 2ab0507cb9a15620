"""What docs/own-model.md promises: the table names every member, and an adapter is one line."""

import re

import pytest
from diffusers import DDIMPipeline, DDIMScheduler
from helpers.micro_families import micro_family
from helpers.paths import ROOT

from ddpo_env import DiffusionModel, models

ROBOT, FAMILY = (ROOT / "docs" / "own-model.md").read_text("utf-8").split("## A pipeline is its own adapter")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


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
