"""The model card of an exported LoRA, `README.md`: metadata for the Hub, and what a stranger must know.

Text that comes from files or settings is escaped, so it cannot become markup. Paths of this machine are not in the
card: of a prompt file only its name is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from agents.commands.export.base_model import PACKAGED, BaseModel
from agents.commands.export.example import example, named_prompts
from agents.commands.export.kohya import KOHYA_FILE
from agents.commands.export.measured import Measured
from agents.commands.finished_run import FinishedRun
from agents.evaluation.comparison_report import tables
from agents.output.terminal import escaped
from ddpo_env import __version__
from ddpo_env.prompts import PROMPT_SETS
from ddpo_env.prompts.images import IMAGE

CURVE, SAMPLES = "curve.png", "samples.png"
"""The images of the card."""

_MARKUP = re.compile(r"([\\`*_{}\[\]()<>#|~$&])")
_SHOWN_PROMPTS = 8
UNKNOWN, PACKAGE_LICENCE = "unknown", "apache-2.0"
"""The Hub's words for a licence that nobody has named, and for the one of this package and its bundled models."""
_TAGS = {
    "StableDiffusionPipeline": ["stable-diffusion", "stable-diffusion-diffusers"],
    "StableDiffusionXLPipeline": ["stable-diffusion-xl", "stable-diffusion-xl-diffusers"],
    "StableDiffusion3Pipeline": ["sd3", "sd3-diffusers"],
    "FluxPipeline": ["flux", "flux-diffusers"],
}
"""The tags that diffusers' training scripts give, by the pipeline's class."""
_KINDS = {"image": "text-to-image", "video": "text-to-video"}


@dataclass(frozen=True)
class Exported:
    """What the card is about.

    Attributes:
        run: that has trained the LoRA.
        iteration: after which the LoRA was saved.
        base: the model that it belongs to.
        measured: an evaluation; `None`: there is none.
        licence: the Hub's identifier of the LoRA's licence; `None`: the user has named none.
        prompt: of the example; `None`: the first of the run's prompt set.
        repo_id: where the folder goes on the Hub; `None`: that is not known.
        has_samples: whether the folder has the grid of samples.
        without_kohya: why there is no file in kohya's form; `None`: there is one.
    """

    run: FinishedRun
    iteration: int
    base: BaseModel
    measured: Measured | None
    licence: str | None
    prompt: str | None
    repo_id: str | None
    has_samples: bool
    without_kohya: str | None

    @property
    def licence_id(self) -> str:
        """The licence in the metadata."""
        return self.licence or (PACKAGE_LICENCE if self.base.name == PACKAGED else UNKNOWN)


def markdown(text: object) -> str:
    """Return a text in one line that Markdown shows as it is, without markup, unless a line begins with it."""
    return _MARKUP.sub(r"\\\1", " ".join(escaped(text).split()))


def model_card(exported: Exported) -> ModelCard:
    """Return the card."""
    run, base = exported.run, exported.base
    name = "the bundled model of ddpo-env" if base.name == PACKAGED else markdown(base.name)
    is_edit = IMAGE in base.model.prompt_fields
    kind = "image-to-image" if is_edit else _KINDS.get(base.model.sample_kind)
    of_the_hub: dict[str, Any] = {"base_model": base.name, "base_model_relation": "adapter"} if base.is_on_hub else {}
    data = ModelCardData(
        license=exported.licence_id,
        library_name="diffusers",
        pipeline_tag=kind,
        tags=[
            *([kind] if kind else []),
            *_TAGS.get(base.pipeline_class, []),
            "diffusers",
            "lora",
            "ddpo",
            "reinforcement-learning",
        ],
        **of_the_hub,
    )
    sections = [
        f"# LoRA for {name}, trained on the reward {markdown(run.config.reward)}",
        f"This LoRA was trained by reinforcement learning with ddpo-env {__version__}, to earn {_task(run)}",
        *(
            [f"![The same prompts and seeds before, during and after training]({SAMPLES})"]
            if exported.has_samples
            else []
        ),
        f"![Mean reward of every iteration, and on held-out seeds]({CURVE})",
        f"## Use\n\n{_use(exported)}",
        f"## Measured\n\n{_measured(exported)}",
        f"## Not measured\n\n{_not_measured(exported)}",
        f"## Training\n\n{_training(exported)}",
        f"## Licence\n\n{_licence(exported)}",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def _task(run: FinishedRun) -> str:
    """Say what was asked of the model."""
    config = run.config
    if config.prompts in PROMPT_SETS:
        prompts = named_prompts(run.config)
        few = ", ".join(f"“{markdown(one)}”" for one in prompts[:_SHOWN_PROMPTS])
        more = f", and {len(prompts) - _SHOWN_PROMPTS} more" if len(prompts) > _SHOWN_PROMPTS else ""
        source = f"the prompt set {markdown(config.prompts)} ({few}{more})"
    else:
        source = f"prompts of a file, {markdown(Path(config.prompts).name)}"
    return f"more of the reward {markdown(config.reward)} with {source}."


def _use(exported: Exported) -> str:
    """Return the example, which runs as it is, and what to know of its lines."""
    base = exported.base
    strength = exported.measured.strength if exported.measured is not None else None
    code = example(base, exported.run.config, exported.prompt, strength or 1.0, exported.repo_id or ".")
    lines = [f"```python\n{code}\n```", ""]
    place = "the folder of this file" if exported.repo_id is None else "this repository"
    lines.append(f"The name in `load_lora_weights` is {place}. " + _strength(exported))
    if exported.without_kohya is None:
        lines += [
            "",
            f"`{KOHYA_FILE}` holds the same LoRA for ComfyUI, AUTOMATIC1111 and other programs. diffusers reads the "
            "same adapters from both files, bit for bit; in the other programs it was not tried.",
        ]
    else:
        lines += ["", f"There is no file for ComfyUI or AUTOMATIC1111: {markdown(exported.without_kohya)}."]
    return "\n".join(lines)


def _strength(exported: Exported) -> str:
    """Say which strength to use, and how that is known."""
    measured = exported.measured
    if measured is None:
        return "The number in `set_adapters` is the strength. No other strength than 1 was measured."
    others = ", ".join(f"{one:g}" for one in measured.strengths)
    if measured.strength is not None:
        return (
            f"The number in `set_adapters` is the strength with the highest mean of every reward below, among {others}"
            " (0 is the base model). It was chosen on the same images."
        )
    if all(strength == 0 for sets in measured.best.values() for strength in sets.values()):
        tuned = ", ".join(f"{one:g}" for one in measured.strengths if one)
        return f"**No strength that was measured ({tuned}) scored higher than the base model.**"
    found = "; ".join(
        f"{markdown(reward)} on {markdown(name)}: {strength:g}"
        for reward, sets in measured.best.items()
        for name, strength in sets.items()
    )
    return (
        "The number in `set_adapters` is the strength. The one with the highest mean depends on what is measured "
        f"({found}; 0 is the base model; compared were {others})."
    )


def _measured(exported: Exported) -> str:
    """Return the rewards before and after training, and the tables of an evaluation."""
    run, config = exported.run, exported.run.config
    lines = ["| reward | before training | with this LoRA |", "| --- | --- | --- |"]
    for name, curve in ((config.reward, run.evaluations), (config.run.holdout_reward, run.holdout)):
        by_votes = "votes" in {term.partition(":")[0] for term in str(name).split(",")}  # its judge's scale moves
        if curve and not by_votes:
            means: Mapping[int, float] = dict(curve)
            note = "" if name == config.reward else ", not trained on"
            lines.append(
                f"| {markdown(name)}{note} | {_number(means.get(0))} | {_number(means.get(exported.iteration))} |"
            )
    samples = run.summary["eval_samples"]
    lines += ["", f"These are means over {samples} samples of the training's prompts, from held-out seeds."]
    if exported.measured is not None:
        plain = [
            replace(one, reward=markdown(one.reward), prompt_set=markdown(one.prompt_set))
            for one in exported.measured.results
        ]
        lines += ["", "Stock diffusers made the images of the following evaluation:", ""]
        lines.append(re.sub("^## ", "### ", tables(plain).strip(), flags=re.MULTILINE))
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def _not_measured(exported: Exported) -> str:
    lines = [
        "- What people think of the samples. A reward is an approximation: a model that is trained on it for long "
        "earns more of it with worse samples.",
        "- Other numbers of steps, guidance scales, samplers and resolutions than those of the training.",
    ]
    if exported.measured is None:
        lines += ["- Other prompts than those of the training.", "- Strengths other than 1."]
    return "\n".join(lines)


def _training(exported: Exported) -> str:
    """Return the settings that describe the training, without paths."""
    run, config = exported.run, exported.run.config
    policy, training, summary = config.policy, config.training, run.summary
    last = summary["iterations"]
    started = [one.name for one in (policy.lora, config.run.base_lora) if one is not None]
    rows = {
        "algorithm": config.algorithm
        + ("" if config.traits.differentiates_reward else f", advantages: {training.advantage}"),
        "iterations": f"{exported.iteration} of {last}" if exported.iteration != last else last,
        "reward queries": summary["reward_queries"] * exported.iteration // last,
        "samples per iteration": config.samples_per_iteration,
        "learning rate": f"{config.learning_rate:g}, {config.optimizer.learning_rate_schedule}",
        "LoRA": f"rank {policy.lora_rank}, {policy.lora_targets}"
        if policy.lora is None
        else "layers of the first LoRA",
        **({"begun with the LoRA": ", ".join(started)} if started else {}),
        "denoising steps": config.num_inference_steps,
        "guidance scale": policy.guidance_scale,
        "sampler": policy.sampler or "the default of the family",
        "noise": f"eta {policy.eta}" if policy.noise_level is None else f"noise level {policy.noise_level}",
        "resolution": config.run.resolution or "the model's own",
        **({"weights of the base model": config.run.quantization} if config.run.quantization else {}),
        "seed": config.seed,
        **({"stopped early": summary["stopped_early"]} if summary["stopped_early"] else {}),
        "time": f"{summary['wall_clock_seconds']:.0f} s in the last process",
        "versions": ", ".join(f"{name} {value}" for name, value in summary["versions"].items()),
    }
    table = [f"| {name} | {markdown(value)} |" for name, value in rows.items()]
    return "\n".join(["| setting | value |", "| --- | --- |", *table])


def _licence(exported: Exported) -> str:
    base, licence = exported.base, exported.licence_id
    if base.name == PACKAGED and licence == PACKAGE_LICENCE:
        return (
            "Apache-2.0, as ddpo-env and its bundled model, which was trained on renderings of Noto Color Emoji "
            "(SIL Open Font License 1.1)."
        )
    named = "No licence was named when this LoRA was exported." if licence == UNKNOWN else f"{markdown(licence)}."
    return f"{named} The licence of the base model applies to what is made with it."
