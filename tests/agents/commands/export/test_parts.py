"""Parts of `ddpo-export`: kohya's names, the choice of weights and of the strength, and text that stays text."""

from dataclasses import replace
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from helpers.lora_files import ADAPTED, save_diffusers_lora
from helpers.micro_families import micro_family
from helpers.micro_pipeline import micro_pipeline
from helpers.more_families import build
from markdown_it import MarkdownIt
from safetensors.torch import load_file

from agents.commands.export.base_model import base_model
from agents.commands.export.example import example
from agents.commands.export.kohya import write_kohya
from agents.commands.export.measured import Measured
from agents.commands.export.model_card import Exported, markdown, model_card
from agents.commands.finished_run import FinishedRun
from agents.config.train_config import TrainConfig
from agents.evaluation.comparison import Estimate, Result
from ddpo_env.models import resolve_source
from ddpo_env.sampler.gaussian_sampler import GaussianSampler


@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_xl"])
def test_text_encoders_and_convolutions_survive_kohyas_form(family: str, tmp_path: Path) -> None:
    """The names are those that kohya's own scripts write; the images are the same to the bit."""
    is_xl = family == "stable_diffusion_xl"
    pipe: Any = micro_family(family) if is_xl else micro_pipeline()
    networks = {name: getattr(pipe, name) for name in ("unet", "text_encoder", *(["text_encoder_2"] if is_xl else []))}
    lora = save_diffusers_lora(
        tmp_path / "lora.safetensors", networks, endings=(*ADAPTED, "k_proj", "v_proj", "out_proj")
    )
    pipe.save_pretrained(tmp_path / "model")
    base = base_model(TrainConfig(), str(tmp_path / "model"))
    assert write_kohya(lora, tmp_path / "kohya.safetensors", base) is None
    tensors = load_file(tmp_path / "kohya.safetensors")
    te = ["lora_te1", "lora_te2"] if is_xl else ["lora_te"]
    layers = [f"{one}_text_model_encoder_layers_0_self_attn_q_proj" for one in te]
    layers += [
        "lora_unet_down_blocks_0_resnets_0_conv1",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q",
    ]
    for layer in layers:
        assert tensors[f"{layer}.alpha"].dtype == torch.float32
        assert tensors[f"{layer}.alpha"] == len(tensors[f"{layer}.lora_down.weight"]) == 3
    images = []
    for file in (lora, tmp_path / "kohya.safetensors"):
        stock = (StableDiffusionXLPipeline if is_xl else StableDiffusionPipeline).from_pretrained(tmp_path / "model")
        stock.load_lora_weights(str(file))
        call = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 2, "output_type": "np"}
        images.append(stock("a cat", **call).images)
    np.testing.assert_array_equal(*images)


def test_form_that_diffusers_does_not_read_is_left_out_and_the_cause_is_named(tmp_path: Path) -> None:
    """diffusers recognises the LoRA of a text encoder by its output projections."""
    pipe = micro_pipeline()
    networks = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    lora = save_diffusers_lora(tmp_path / "lora.safetensors", networks)  # of the text encoder only q_proj
    pipe.save_pretrained(tmp_path / "model")
    reason = write_kohya(lora, tmp_path / "kohya.safetensors", base_model(TrainConfig(), str(tmp_path / "model")))
    assert reason is not None
    assert "Could not automatically infer state dict type" in reason
    assert not (tmp_path / "kohya.safetensors").exists()


@pytest.mark.parametrize(
    ("family", "settings", "call"),
    [
        ("qwen_image", {"guidance_scale": 3.0}, 'true_cfg_scale=3.0, negative_prompt="")'),
        ("sana", {"guidance_scale": 3.0}, "guidance_scale=3.0, use_resolution_binning=False)"),
        ("wan", {"pipeline_arguments": ("num_frames=5",)}, "guidance_scale=1.0, num_frames=5).frames[0]"),
    ],
)
def test_example_calls_each_family_in_its_own_way(
    family: str, settings: dict[str, Any], call: str, tmp_path: Path
) -> None:
    """A flow keeps its scheduler, also where the call has an `eta`; a video is written as one."""
    build(family).save_pretrained(tmp_path)
    config = TrainConfig().changed(**settings)
    code = example(base_model(config, str(tmp_path)), config, "a cat", 1.0, "me/lora")
    sample = next(line for line in code.splitlines() if line.startswith("sample = "))
    assert sample.startswith('sample = pipe("a cat", num_inference_steps=10, ')
    assert [part for part in call.removesuffix(")").split(", ") if part not in sample] == []
    assert ("export_to_video(sample" in code) == (family == "wan")
    assert "DDIMScheduler" not in code
    assert "eta=" not in code


def test_example_has_the_timesteps_of_training_where_the_pipeline_has_another_scheduler(tmp_path: Path) -> None:
    pipe: Any = micro_pipeline()
    pipe.scheduler = EulerDiscreteScheduler()
    pipe.save_pretrained(tmp_path)
    base = base_model(TrainConfig(), str(tmp_path))
    code = example(base, TrainConfig(), "a cat", 1.0, "me/lora")
    made: Any = SimpleNamespace(scheduler=EulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler"))
    line = next(line for line in code.splitlines() if line.startswith("pipe.scheduler = "))
    exec(line, {"pipe": made, "DDIMScheduler": DDIMScheduler})
    made.scheduler.set_timesteps(10)
    assert made.scheduler.timesteps.tolist() == GaussianSampler.from_scheduler(pipe.scheduler, 10).timesteps.tolist()


@pytest.mark.parametrize(("steps", "eta"), [(3, 0.999), (10, 1.0), (50, 0.999)])
def test_example_has_no_eta_with_which_diffusers_makes_nan(steps: int, eta: float) -> None:
    config = TrainConfig().changed(num_inference_steps=steps)
    code = example(base_model(config, None), config, None, 1.0, "me/lora")
    assert f"num_inference_steps={steps}, " in code
    assert f"eta={eta})" in code
    assert ("# not the training's eta 1" in code) == (eta != 1)
    scheduler = DDIMScheduler.from_pretrained(resolve_source("tiny"), subfolder="scheduler")
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    for timestep in scheduler.timesteps:
        latents = scheduler.step(latents, timestep, latents, eta=eta, generator=generator).prev_sample
    assert latents.isfinite().all()


def made_up_run(folder: Path, holdout: tuple[float, ...]) -> FinishedRun:
    for name in ("lora", "best/lora"):
        (folder / name).mkdir(parents=True)
        (folder / name / "pytorch_lora_weights.safetensors").touch()
    evaluations = [(0, 1.0), (2, 3.0), (4, 5.0)]
    scores = list(zip((0, 2, 4), holdout, strict=False))
    return FinishedRun(folder, TrainConfig(), {"iterations": 4}, evaluations[1:], evaluations, scores)


def test_weights_are_those_that_the_held_out_reward_prefers(tmp_path: Path) -> None:
    overoptimised = made_up_run(tmp_path, (1.0, 2.0, 1.5))
    last, best = tmp_path / "lora", tmp_path / "best" / "lora"
    for run, which, iteration, folder in (
        (overoptimised, None, 2, best),
        (overoptimised, "last", 4, last),
        (replace(overoptimised, holdout=[]), None, 4, last),
        (replace(overoptimised, holdout=[]), "best", 4, best),
    ):
        found, file = run.lora(which)
        assert (found, file.parent) == (iteration, folder)
    useless = replace(overoptimised, holdout=[(0, 2.0), (2, 1.0), (4, 0.0)])
    with pytest.raises(ValueError, match="the pretrained model is better"):
        useless.lora(None)
    with pytest.raises(ValueError, match="no evaluation was better than before training"):
        useless.lora("best")
    assert useless.lora("last")[0] == 4
    older = replace(overoptimised, holdout=[])  # their summaries do not say whether anything was learned
    assert replace(older, summary=older.summary | {"has_learned": True}).lora(None) == older.lora(None)
    untrained = replace(older, summary=older.summary | {"has_learned": False})
    with pytest.raises(ValueError, match=r"has learned nothing: no iteration had a gradient, .*--weights last"):
        untrained.lora(None)
    assert untrained.lora("last")[0] == 4
    (last / "pytorch_lora_weights.safetensors").rename(last / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="in peft's format"):
        overoptimised.lora("last")


def test_card_of_the_best_weights_of_the_bundled_model(tmp_path: Path) -> None:
    """It has the numbers of that iteration, and the licence of the package, which has the model's files."""
    run = made_up_run(tmp_path, (1.0, 2.0, 1.5))
    summary = {"iterations": 4, "reward_queries": 48, "wall_clock_seconds": 9.0, "eval_samples": 6, "versions": {}}
    reason = "the score fell | at last"
    config = TrainConfig().changed(holdout_reward="tiny_reader").resolved()
    run = replace(run, config=config, summary=summary | {"stopped_early": reason})
    base = base_model(config, None)
    text = str(model_card(Exported(run, 2, base, None, None, None, None, has_samples=False, without_kohya=None)))
    for line in (
        "license: apache-2.0",
        "| jpeg\\_compressibility | 1 | 3 |",
        "| tiny\\_reader, not trained on | 1 | 2 |",
        "| iterations | 2 of 4 |",
        "| reward queries | 24 |",
        "| stopped early | the score fell \\| at last |",
        'pipe = DiffusionPipeline.from_pretrained(str(files("ddpo_env") / "data" / "tiny"))',
    ):
        assert f"\n{line}\n" in text, line
    assert "samples.png" not in text


@pytest.mark.parametrize(
    ("means", "strength"),
    [
        ({"a": (1, 3, 2), "b": (0, 9, 1)}, 0.5),
        ({"a": (1, 3, 2), "b": (0, 1, 9)}, None),
        ({"a": (3, 2, 1), "b": (9, 1, 0)}, None),
    ],
)
def test_strength_is_advised_only_if_every_measurement_agrees(means: dict[str, Any], strength: float | None) -> None:
    results = [
        Result(reward, "animals", at, 2, 4, False, Estimate(float(mean), None), None)
        for reward, values in means.items()
        for at, mean in zip((0.0, 0.5, 1.0), values, strict=True)
    ]
    assert Measured(results).strength == strength


@pytest.mark.parametrize(
    "text", ["my_rewards:f_x", "a|b](http://x.y)<img src=x>", "# *bold* `code`", "![i](j) &amp; \\ $x$", "1. - + x"]
)
def test_text_of_files_is_no_markup(text: str) -> None:
    assert MarkdownIt().render(f"x {markdown(text)}") == f"<p>x {escape(text)}</p>\n"
    row = MarkdownIt().enable("table").render(f"| a |\n| --- |\n| {markdown(text)} |")
    assert f"<td>{escape(text)}</td>" in row
