"""The compiled denoiser: the same results, whatever the batch's size, without compiling anew for each."""

import pytest
import torch
from helpers.algorithms import collected, denoising_ppo, logged
from helpers.micro_agents import micro_env, micro_policy, stir, weights
from helpers.micro_families import micro_family

from agents.policy import compilation
from agents.policy.diffusion_policy import DiffusionPolicy


@pytest.fixture
def compiled_graphs(monkeypatch):
    """The number of graphs that were handed to the compiler, which here runs them as they are."""
    graphs = []
    torch._dynamo.reset()
    monkeypatch.setattr(compilation, "BACKEND", lambda graph, inputs: graphs.append(graph) or graph.forward)
    yield graphs
    torch._dynamo.reset()


@pytest.fixture
def model_folder(request, micro_pipeline_folder, tmp_path):
    """Folder of a micro model of a family: a transformer is traced in a quarter of a UNet's time."""
    if request.param == "stable_diffusion_1":
        return micro_pipeline_folder
    micro_family(request.param).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


UNET = pytest.param("stable_diffusion_1", marks=pytest.mark.slow)


@pytest.mark.parametrize("model_folder", ["stable_diffusion_3", UNET], indirect=True)
def test_batches_of_other_sizes_need_no_other_graph(model_folder, compiled_graphs):
    policies = [
        stir(micro_policy(micro_env(model_folder), compile_denoiser=compiled, lora_targets="attention"))
        for compiled in (True, False)
    ]
    counts = []
    for rows in (4, 2, 7, 5):
        observation, _ = micro_env(model_folder, num_envs=rows).reset(seed=0)
        with torch.no_grad():
            compiled, plain = (policy.get_distribution(observation).mean for policy in policies)
        torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5)
        counts.append(len(compiled_graphs))
    assert counts[0] >= 1
    assert set(counts) == {counts[0]}


@pytest.mark.slow
@pytest.mark.parametrize("model_folder", ["flux_schnell", "stable_diffusion_1"], indirect=True)
def test_training_gives_the_same_weights(model_folder, compiled_graphs):
    trained = []
    for compiled in (True, False):
        policy = {"compile_denoiser": compiled, "optimizer_class": torch.optim.SGD, "lora_targets": "attention"}
        if model_folder.name == "model":
            policy["guidance_scale"] = 1.0
        model = denoising_ppo(model_folder, micro_batch_size=7, learning_rate=1.0, policy=policy)
        stir(model.policy, 0.05)
        collected(model).train()
        assert logged(model)["train/ratio_deviation"] <= 1e-5
        trained.append(weights(model.policy))
    assert compiled_graphs
    for name, value in trained[0].items():
        torch.testing.assert_close(value, trained[1][name], rtol=1e-4, atol=1e-5)


def test_names_of_what_is_saved_stay(micro_pipeline_folder, tmp_path):
    policies = [micro_policy(micro_env(micro_pipeline_folder), compile_denoiser=compiled) for compiled in (True, False)]
    assert policies[0].state_dict().keys() == policies[1].state_dict().keys()
    policies[0].save(tmp_path)
    assert DiffusionPolicy.load(tmp_path, device="cpu").options.compile_denoiser


def test_a_missing_compiler_is_told_at_once(micro_pipeline_folder, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="compile_denoiser must be False without a C\\+\\+ compiler"):
        micro_policy(micro_env(micro_pipeline_folder), compile_denoiser=True)


@pytest.mark.slow
def test_the_real_compiler_gives_the_same_means(micro_pipeline_folder):
    observation, _ = micro_env(micro_pipeline_folder).reset(seed=0)
    means = []
    for compiled in (True, False):
        policy = stir(micro_policy(micro_env(micro_pipeline_folder), compile_denoiser=compiled))
        with torch.no_grad():
            means.append(policy.get_distribution(observation).mean)
    torch.testing.assert_close(means[0], means[1], rtol=1e-4, atol=1e-4)
