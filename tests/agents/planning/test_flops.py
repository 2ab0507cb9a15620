"""What a run costs: operations against closed forms and published ones, rows against those that a run computes."""

import itertools
import json
import time

import pytest
import torch
from helpers.micro_agents import micro_config
from helpers.micro_families import FAMILIES, micro_family
from helpers.micro_pipeline import micro_pipeline
from torch.utils.flop_counter import FlopCounterMode

from agents.config.algorithms import ALGORITHMS
from agents.config.presets import preset_config
from agents.planning import flops
from agents.planning.flops import Flops, count_flops, describe_seconds, estimate_time
from agents.planning.plan import denoiser_rows
from agents.training.preparation import prepare_run
from ddpo_env.models.loading import load_model
from ddpo_env.models.outline import outline_model
from ddpo_env.models.random_pipelines import build_component

SD14 = "CompVis/stable-diffusion-v1-4"


def published(**changes):
    """The paper's compressibility task."""
    return preset_config("sd14-compressibility").changed(device="cpu", **changes).resolved()


def test_operations_of_a_perceptron():
    outline = outline_model("points")
    forward = 2 * (34 * 64 + 64 * 64 + 64 * 2)
    weights = forward - 2 * 34 * 64  # the gradient of the first layer's input is not needed
    assert count_flops(outline, lora_rank=0) == Flops(forward, forward + forward + weights, 0.0)


@pytest.mark.usefixtures("count_once")
def test_operations_of_stable_diffusion_are_the_published_ones():
    """339 G multiplications in layers with weights, without the products of attention (Kim et al. 2023, BK-SDM)."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        build_component("sd14", "unet")(torch.zeros(1, 4, 64, 64), torch.zeros(1), torch.zeros(1, 77, 768))
    total = counter.get_total_flops()
    attention = sum(n for name, n in counter.get_flop_counts()["Global"].items() if str(name) == "aten.bmm")
    assert (total - attention) / 2 == pytest.approx(339e9, rel=2e-3)
    work = flops.count_flops(outline_model(SD14), lora_rank=4)
    assert total < work.forward < 1.01 * total, "the adapters add little"
    assert 2 * total < work.training < 2.5 * total, "no gradient of frozen weights"


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "reinforce"])
def test_rows_are_those_that_a_run_computes(micro_pipeline_folder, tmp_path, monkeypatch, guidance, algorithm):
    # Standardised in pairs, half of the advantages would be 1 and none the single best.
    choice = {"algorithm": algorithm, "updates_per_iteration": 1, "timestep_fraction": 0.5}
    if algorithm != "draft":
        choice["advantage"] = "group" if algorithm == "grpo" else "batch"
    config = micro_config(micro_pipeline_folder, tmp_path / "run", guidance_scale=guidance, **choice)
    algorithm = prepare_run(config).algorithm
    _, callback = algorithm._setup_learn(1)
    rows = {"sampling": 0, "training": 0}
    model = algorithm.policy.model
    predict = type(model).predict

    def counted(self, denoiser, latents, timestep, conditioning):
        kind = "training" if torch.is_grad_enabled() else "sampling"
        rows[kind] += len(latents)
        return predict(self, denoiser, latents, timestep, conditioning)

    monkeypatch.setattr(type(model), "predict", counted)
    algorithm.collect_rollouts(algorithm.env, callback, algorithm.rollout_buffer, algorithm.n_steps)
    sampled = rows["sampling"]
    algorithm.train()
    planned = denoiser_rows(config.resolved())
    assert (config.iterations * sampled, config.iterations * rows["training"]) == (planned.sampling, planned.training)


@pytest.mark.usefixtures("count_once")
def test_estimate_of_the_published_run(monkeypatch):
    monkeypatch.setattr(flops, "matmul_rate", lambda device, dtype: 1e14)
    said = estimate_time(published())
    seconds = 100 * 65.1e15 / 0.9e14 + 11 * 64 / 256 * 21.2e15 / 0.9e14
    assert said.startswith(
        f"about {seconds / 3600:.0f} h plus the reward's, 12 min per iteration: 21 PFLOP of sampling"
    )
    assert said.endswith("44 PFLOP of training at 90% of 100 TFLOP/s, the rate of matrix products")
    assert estimate_time(published(), processes=4).startswith(f"about {seconds / 3600 / 4:.1f} h")


def test_rate_is_known_soon_where_a_product_is_slow(monkeypatch):
    """A small product of 10 ms, as in float16 on a CPU, of which a large one has 64 times the operations or more."""
    clock = itertools.count(0, 0.01)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    with FlopCounterMode(display=False) as counter:
        rate = flops.matmul_rate(torch.device("cpu"), torch.float32)
    assert rate == pytest.approx(2 * 256**3 / 0.01)
    assert counter.get_total_flops() == 5 * 2 * 256**3


def test_what_is_not_here_is_not_estimated():
    assert estimate_time(published(model="somebody/something")) == "not known before somebody/something is loaded"


@pytest.mark.parametrize(
    ("seconds", "said"), [(3.21, "3.2 s"), (119, "119 s"), (130, "2.2 min"), (7200, "2.0 h"), (1e6, "12 days")]
)
def test_times_are_told_in_a_unit_that_suits(seconds, said):
    assert describe_seconds(seconds) == said


@pytest.mark.parametrize("family", ["stable_diffusion_1", *FAMILIES])
def test_outline_has_the_shapes_of_the_model_and_needs_no_weights(tmp_path, family):
    pipeline = micro_pipeline() if family == "stable_diffusion_1" else micro_family(family)
    pipeline.save_pretrained(tmp_path)
    model = load_model(tmp_path, "cpu")
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    index = json.loads((tmp_path / "model_index.json").read_text())
    if "feature_extractor" in index:
        index["feature_extractor"] = ["transformers", "CLIPFeatureExtractor"]  # as in old folders; it is no more
        (tmp_path / "model_index.json").write_text(json.dumps(index))
    outline = outline_model(tmp_path)
    assert outline.latent_shape == model.latent_shape
    assert outline.conditioning_shapes == model.conditioning_shapes
    assert {weight.device.type for weight in outline.denoiser.parameters()} == {"meta"}
    names = {name: weight.shape for name, weight in model.denoiser.named_parameters()}
    assert {name: weight.shape for name, weight in outline.denoiser.named_parameters()} == names
    assert count_flops(outline, lora_rank=2).training > 0
