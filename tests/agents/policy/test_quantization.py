"""A frozen denoiser in 8 or 4 bits under a LoRA: it learns, its memory is counted, and stock diffusers reads it.

The reference for the numbers is the dequantized pipeline: the same layers with the weights that torchao gives back.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, TorchAoConfig, UNet2DConditionModel
from helpers.micro_agents import micro_config, micro_env, micro_policy, resume_config, stir, train_a_step, weights
from torch import nn

from agents.config.train_config import train_config
from agents.distributed import Processes
from agents.planning.weights import count_weights, describe_weights
from agents.policy.diffusion_policy import DiffusionPolicy
from agents.training.preparation import check_run, run_training
from ddpo_env import load_model
from ddpo_env.models import check_source
from ddpo_env.models.quantization import quantization_of, stored_bytes
from rewards.networks.pretrained import stored_tensors

pytest.importorskip("torchao")
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, NF4Tensor

KINDS = ("int8", "nf4")


def dequantized(network: nn.Module) -> UNet2DConditionModel:
    """A network without quantization that has the values of a quantized one."""
    plain = UNet2DConditionModel.from_config(dict(network.config) | {"quantization_config": None})
    state = {
        name: value.get_original_weight() if isinstance(value, NF4Tensor) else value.dequantize()
        for name, value in network.state_dict().items()
    }
    plain.load_state_dict(state)
    return plain.eval()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_a_layer_computes_with_the_rounded_weights(micro_pipeline_folder: Path, kind: Any) -> None:
    model, plain = (load_model(micro_pipeline_folder, "cpu", quantization=one) for one in (kind, None))
    assert quantization_of(model.denoiser) == kind
    assert quantization_of(plain.denoiser) is None
    rounded = dequantized(model.denoiser)
    latents, timestep = torch.randn(2, *model.latent_shape), torch.tensor([900.0, 20.0])
    conditioning = model.encode_prompts(["a cat", "a dog"])
    with torch.no_grad():
        output = model.predict(model.denoiser, latents, timestep, conditioning)
        torch.testing.assert_close(output, model.predict(rounded, latents, timestep, conditioning))
        unquantized = plain.predict(plain.denoiser, latents, timestep, conditioning)
    error = float((output - unquantized).norm() / unquantized.norm())
    assert 1e-4 < error < {"int8": 0.02, "nf4": 0.2}[kind]


def test_the_plan_counts_the_bytes_that_are_stored(micro_pipeline_folder: Path, kind: Any) -> None:
    config = micro_config(micro_pipeline_folder, None, quantization=kind, dtype="bfloat16").resolved()
    counted = count_weights(config)
    model: Any = load_model(micro_pipeline_folder, "cpu", "bfloat16", quantization=kind)
    networks = {name: one for name, one in model.pipeline.components.items() if isinstance(one, nn.Module)}
    assert counted is not None
    assert counted.frozen == {name: stored_bytes(one) for name, one in networks.items()}
    linear = [layer for layer in model.denoiser.modules() if isinstance(layer, nn.Linear)]
    stored = sum(part.nbytes for layer in linear for part in stored_tensors(layer.weight))
    shapes = [tuple(layer.weight.shape) for layer in linear]
    if kind == "int8":  # a byte per weight; a float32 scale and a zero point of a byte per output channel
        assert stored == sum(rows * columns + 5 * rows for rows, columns in shapes)
    else:  # half a byte per weight, a byte per block of 64, and few numbers per group of blocks; 1.5 bytes saved of 2
        assert stored < 0.8 * sum(rows * columns for rows, columns in shapes)
    policy = micro_policy(micro_env(model, dtype="bfloat16"), lora_targets="attention+convolutions")
    assert counted.learning == 4 * sum(weight.nbytes for weight in policy.trainable_parameters())
    assert f" unet in {kind}, " in describe_weights(config)


def test_the_ratio_is_1_and_only_adapters_learn(micro_pipeline_folder: Path, kind: Any) -> None:
    env = micro_env(micro_pipeline_folder, quantization=kind)
    policy = stir(micro_policy(env))
    frozen = [part.clone() for part in parts(env.model.denoiser)]
    observation, _ = env.reset(seed=0)
    with torch.no_grad(), policy.sampling_weights():
        actions, _, log_probs = policy(observation)
    _, again, _, kl = policy.evaluate_with_reference(observation, actions)
    torch.testing.assert_close((again - log_probs).exp(), torch.ones(4), atol=1e-6, rtol=0)
    assert bool((kl > 0).all()), "the reference is the denoiser without adapters"
    before = weights(policy)
    train_a_step(policy, observation)
    assert all(bool(weight.grad.any()) for weight in policy.trainable_parameters())
    assert all(not torch.equal(before[name], value) for name, value in policy.state_dict().items())
    assert all(torch.equal(old, new) for old, new in zip(frozen, parts(env.model.denoiser), strict=True))
    assert all(".lora_" in name for name in policy.state_dict())


def test_fresh_adapters_change_nothing(micro_pipeline_folder: Path, kind: Any) -> None:
    env = micro_env(micro_pipeline_folder, quantization=kind)
    observation, _ = env.reset(seed=0)
    policy = micro_policy(env)
    kl = policy.evaluate_with_reference(observation, observation["latents"])[3]
    assert torch.equal(kl, torch.zeros(4))


def test_stock_diffusers_reads_the_lora_with_and_without_quantization(
    micro_pipeline_folder: Path, tmp_path: Path, kind: Any
) -> None:
    model, plain = (load_model(micro_pipeline_folder, "cpu", quantization=one) for one in (kind, None))
    learned, same = (stir(micro_policy(micro_env(one), guidance_scale=1.0), 0.05) for one in (model, plain))
    learned.save_lora(tmp_path)
    inputs = torch.randn(1, *model.latent_shape), torch.tensor(500), model.encode_prompts(["a cat"])["prompt_embeds"]
    for base, ours in ((model, learned), (plain, same)):
        unet = UNet2DConditionModel.from_pretrained(
            micro_pipeline_folder / "unet",
            torch_dtype=torch.float32,
            quantization_config=base.denoiser.config.get("quantization_config"),
        )
        stock = StableDiffusionPipeline.from_pretrained(micro_pipeline_folder, unet=unet, safety_checker=None)
        stock.load_lora_weights(tmp_path)
        with torch.no_grad():
            output = stock.unet(*inputs).sample
            torch.testing.assert_close(output, ours.denoiser(*inputs).sample)
            assert not torch.allclose(output, base.denoiser(*inputs).sample, atol=1e-3)


@pytest.mark.slow
def test_a_resumed_run_is_bit_identical(micro_pipeline_folder: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"quantization": "nf4", "kl_coef": 0.1, "eval_interval": 0, "eval_samples": 2}
    settings |= {"samples_per_iteration": 4, "schedule_iterations": 2}
    run_training(micro_config(micro_pipeline_folder, tmp_path / "whole", iterations=2, **settings))
    run_training(micro_config(micro_pipeline_folder, tmp_path / "halves", iterations=1, **settings))
    run_training(resume_config(tmp_path / "halves", iterations=2))
    files = [tmp_path / name / "lora" / "pytorch_lora_weights.safetensors" for name in ("whole", "halves")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert "quantization: nf4" in (tmp_path / "halves" / "config.yaml").read_text()


def test_a_saved_policy_names_its_quantization(micro_pipeline_folder: Path, tmp_path: Path) -> None:
    policy = stir(micro_policy(micro_env(micro_pipeline_folder, quantization="int8")))
    policy.save(tmp_path)
    loaded = DiffusionPolicy.load(tmp_path, "cpu")
    assert loaded.model is policy.model
    plain = micro_env(micro_pipeline_folder)
    assert plain.single_observation_space != policy.observation_space


def test_pipeline_objects_that_are_quantized_already(micro_pipeline_folder: Path) -> None:
    def pipeline(config: Any) -> StableDiffusionPipeline:
        unet = UNet2DConditionModel.from_pretrained(
            micro_pipeline_folder / "unet", torch_dtype=torch.float32, quantization_config=TorchAoConfig(config)
        )
        return StableDiffusionPipeline.from_pretrained(micro_pipeline_folder, unet=unet, safety_checker=None)

    quantized = pipeline(Int8WeightOnlyConfig())
    model = load_model(quantized, "cpu")
    assert load_model(quantized, "cpu", quantization="int8") is model
    with pytest.raises(ValueError, match="quantization must be 'int8' with model 'pipeline/"):
        load_model(quantized, "cpu", quantization="nf4")
    with pytest.raises(ValueError, match="dtype must be float32 with a quantized StableDiffusionPipeline"):
        load_model(quantized, "cpu", "bfloat16")
    with pytest.raises(ValueError, match="must have weights without quantization, or torchao's int8 or nf4"):
        load_model(pipeline(Float8WeightOnlyConfig()), "cpu")


def test_what_cannot_be_quantized_is_refused_by_name(micro_pipeline_folder: Path) -> None:
    for refuse in (load_model, check_source):
        with pytest.raises(ValueError, match="quantization must be None with model 'points'"):
            refuse("points", "cpu", quantization="int8")
        with pytest.raises(ValueError, match="quantization must be None or one of int8, nf4; got 'int3'"):
            refuse(micro_pipeline_folder, "cpu", quantization="int3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="quantization must be None with model 'pipeline/"):
        load_model(StableDiffusionPipeline.from_pretrained(micro_pipeline_folder), "cpu", quantization="int8")
    with pytest.raises(ValueError, match="lora_rank must be at least 1 with quantization='int8'"):
        train_config(quantization="int8", lora_rank=0).resolved()
    env = micro_env(micro_pipeline_folder, quantization="int8")
    with pytest.raises(ValueError, match="lora_rank must be at least 1 with quantization='int8'"):
        micro_policy(env, lora_rank=0)
    with pytest.raises(ValueError, match="merge_lora must be None or False with quantization='int8'"):
        micro_policy(env, merge_lora=True)
    with pytest.raises(ValueError, match="quantization must be None with model 'points'"):
        check_run(micro_config("points", None, quantization="nf4", lora_rank=2), Processes())


def parts(network: nn.Module) -> list[torch.Tensor]:
    """The numbers of a network's weights as they are stored."""
    return [part for weight in network.parameters() for part in stored_tensors(weight)]
