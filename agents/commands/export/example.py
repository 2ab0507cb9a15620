"""The Python code in a model card that loads the LoRA and makes a sample as the run did. It runs as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from agents.commands.export.base_model import PACKAGED, BaseModel
from agents.config.train_config import TrainConfig
from agents.evaluation.generation import LARGEST_SAFE_ETA, stock_eta
from ddpo_env.models.lora.lora_file import DIFFUSERS_FILE
from ddpo_env.prompts import PROMPT_SETS, PromptSet, load_prompts
from ddpo_env.prompts.images import IMAGE
from ddpo_env.sampler.scheduler_table import ddim_of

_PACKAGED = 'str(files("ddpo_env") / "data" / "tiny")'


def example(base: BaseModel, config: TrainConfig, prompt: str | None, strength: float, place: str) -> str:
    """Return the code.

    Args:
        base: the model that the LoRA belongs to.
        config: of the run.
        prompt: `None`: the first of the run's prompt set.
        strength: of the LoRA.
        place: the LoRA's folder or Hub id.

    Raises:
        ValueError: without a prompt for a run with a prompt file, which is not read because the card is public.
    """
    model, is_video = base.model, base.model.sample_kind == "video"
    arguments: dict[str, Any] = {"num_inference_steps": config.num_inference_steps}
    arguments |= model.pipeline_call(config.policy.guidance_scale)
    classes, scheduler, note = ["DiffusionPipeline"], [], []
    if not isinstance(model.scheduler, FlowMatchEulerDiscreteScheduler):  # a flow is sampled by its own
        classes.insert(0, "DDIMScheduler")
        # Named, because diffusers' DDIM has defaults of its own where the pipeline's scheduler says nothing.
        own = ddim_of(model.scheduler).config
        named = f'clip_sample={bool(own.clip_sample)}, timestep_spacing="{own.timestep_spacing}"'
        scheduler = [f"pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, {named})"]
        if "eta" in model.watched.parameters:
            arguments["eta"] = stock_eta(model, config.policy, config.num_inference_steps)
            if arguments["eta"] == LARGEST_SAFE_ETA != config.policy.eta:
                note = ["# not the training's eta 1, with which a rounding error of diffusers makes this image NaN"]
    is_packaged, takes_image = base.name == PACKAGED, IMAGE in model.prompt_fields
    functions = [name for name, used in (("export_to_video", is_video), ("load_image", takes_image)) if used]
    values = {name: _literal(value) for name, value in arguments.items()}
    if takes_image:
        values[IMAGE] = 'load_image("image.png")'
    given = ", ".join([_literal(_prompt(config, prompt)), *(f"{name}={value}" for name, value in values.items())])
    made = 'frames[0]\nexport_to_video(sample, "sample.mp4")' if is_video else 'images[0]\nsample.save("sample.png")'
    return "\n".join(
        [
            *(["from importlib.resources import files", ""] if is_packaged else []),
            f"from diffusers import {', '.join(classes)}",
            *([f"from diffusers.utils import {', '.join(functions)}"] if functions else []),
            "",
            f"pipe = DiffusionPipeline.from_pretrained({_PACKAGED if is_packaged else _literal(base.name)})",
            *scheduler,
            f'pipe.load_lora_weights({_literal(place)}, weight_name="{DIFFUSERS_FILE}", adapter_name="ddpo")',
            f'pipe.set_adapters("ddpo", {strength})',
            *note,
            f"sample = pipe({given}).{made}",
        ]
    )


def named_prompts(config: TrainConfig) -> tuple[str, ...]:
    """Return the prompts of a run's named prompt set."""
    found = load_prompts(config.prompts)
    assert isinstance(found, PromptSet)
    return found.prompts


def _literal(value: Any) -> str:
    """Return a plain value as Python code; texts have double quotes, as JSON's."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _prompt(config: TrainConfig, given: str | None) -> str:
    if given is None and config.prompts not in PROMPT_SETS:
        raise ValueError(
            f"prompt must be given for a run with a prompt file, {Path(config.prompts).name!r}, because the model card "
            "shows it: add --prompt with an example"
        )
    return given or named_prompts(config)[0]
