"""`TrainConfig`: all settings of a run, frozen, checked when it is made, and completed by `resolved`.

The settings that matter most are fields of `TrainConfig`; the others are in groups. All names are unique, so settings
are given flat: `train_config(model="tiny", lora_rank=4)`, on the command line and in `config.yaml` alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from agents.algorithms.options import UpdateOptions, check_noise
from agents.config.algorithms import ALGORITHMS, Advantage, Algorithm, AlgorithmTraits
from agents.config.config_file import read_plain_yaml
from agents.config.settings import MOST, SEED, OptimizerSettings, RunSettings, TrainingSettings, from_python
from agents.config.sizes import largest_divisor, must_divide
from agents.policy.options import PolicyOptions, check_trainable
from ddpo_env.validation.options import Range, check_fields, shown
from rewards import check_differentiable_names, parse_options
from rewards.registry import did_you_mean

_ITERATIONS = 12
TUNED_POLICY = PolicyOptions(guidance_scale=1.0, lora_rank=8, lora_targets="attention+convolutions")
TUNED_UPDATE = UpdateOptions(timestep_window=(0.0, 0.9), timestep_fraction=0.5)
"""Where the defaults of a run differ from those of `PolicyOptions` and `UpdateOptions`, which the Python classes have.
The classes are for any model and have the DDPO paper's values. A run trains the bundled model by default, and these are
tuned for it (docs/training.md)."""


class Tuning(NamedTuple):
    """Settings that a preset has tuned for its algorithm.

    Attributes:
        algorithm: the preset's; empty without a preset.
        settings: their names, without those that the user gave.
    """

    algorithm: str = ""
    settings: frozenset[str] = frozenset()

    def without(self, given: Iterable[str]) -> Tuning:
        """Return the same without settings that the user gave."""
        return self._replace(settings=self.settings.difference(given))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All settings of a training run.

    The defaults are tuned for the bundled model. Those of `PolicyOptions` and `UpdateOptions`, which the Python classes
    have, are the DDPO paper's; `TUNED_POLICY` and `TUNED_UPDATE` are where the two differ.

    Raises:
        ValueError: for a value that is not valid, naming the setting.
    """

    preset: str | None = None
    """Settings of a DDPO experiment: sd14- or tiny-, and compressibility, incompressibility, aesthetic or alignment."""
    model: str = "tiny"
    """Bundled name (tiny), folder in diffusers' layout, a .safetensors file with its configurations in a folder of the
    same name, or Hub id such as CompVis/stable-diffusion-v1-4."""
    reward: str = "jpeg_compressibility"
    """Built-in name, module:function of your own, or weighted sum such as aesthetic:1,clip_score:0.5."""
    reward_options: tuple[str, ...] = ()
    """Arguments of the reward as key=value, such as device=cpu judge_options.timeout=30; term.key=value in a sum."""
    prompts: str = "simple_animals"
    """Name of a prompt set, or a file: .txt with one prompt per line, .jsonl, .json, .csv or .tsv."""
    num_inference_steps: Annotated[int, MOST] = 10
    """Denoising steps, the length of an episode."""
    algorithm: Algorithm = "ppo"
    """ppo (DDPO-IS), grpo (the same with advantages among a prompt's samples), reinforce (DDPO-SF), reward-weighted
    regression: rwr (exponential weights), rwr_sparse; on noised samples, nft (DiffusionNFT), awm (advantage weighted
    matching), dpo (online DPO: a prompt's best sample against its worst); by the reward's gradient, draft (DRaFT-K). On
    the bundled model's alignment nft and awm needed a quarter of ppo's reward queries (docs/race.md)."""
    iterations: Annotated[int | None, MOST] = None
    """Rounds of sampling and training in total. Default: 12; for a resumed run, the number that it started with."""
    samples_per_iteration: Annotated[int, MOST] = 72
    """Samples generated in each iteration."""
    learning_rate: Annotated[float | None, Range(above=0, at_most=1e4)] = None
    """At the start of the run. Default: the algorithm's, tuned on the bundled model (2e-3 for ppo)."""
    seed: Annotated[int, SEED] = 0
    """Seed of weights, prompts, noise and batches."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    run_dir: Path | None = None
    """Folder of the run. Default: runs/<reward>-<date>-<time>."""
    resume: Path | None = None
    """Folder of a run to continue from its last checkpoint, with its own settings; only iterations can change. Code,
    servers, environment variables and paths outside the folder are used only if they are named again."""

    policy: PolicyOptions = TUNED_POLICY
    update: UpdateOptions = TUNED_UPDATE
    training: TrainingSettings = field(default_factory=TrainingSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    run: RunSettings = field(default_factory=RunSettings)

    _given: ClassVar[frozenset[str]] = frozenset()
    """Names of the settings that the user gave; an attribute of the instance, and no setting itself."""
    _tuning: ClassVar[Tuning] = Tuning()
    """What is tuned for a preset's algorithm; an attribute of the instance too."""

    def __post_init__(self) -> None:
        for name in ("run_dir", "resume"):
            if isinstance(path := getattr(self, name), str):
                if not path.strip():
                    raise ValueError(f"{name} must be a path that is not empty; got {path!r}")
                object.__setattr__(self, name, Path(path))
        check_fields(self)

    @property
    def given(self) -> frozenset[str]:
        """Names of the settings that the user gave, also those with the value of the default."""
        flat, defaults = self.flat(), TrainConfig().flat()
        return self._given | {name for name, value in flat.items() if value != defaults[name]}

    def flat(self) -> dict[str, Any]:
        """Return every setting by its name, without the groups."""
        flat: dict[str, Any] = {}
        for one in fields(TrainConfig):
            value = getattr(self, one.name)
            flat |= vars(value) if is_dataclass(value) else {one.name: value}
        return flat

    def with_given(self, names: Iterable[str]) -> TrainConfig:
        """Return the same settings, and note that the user gave these."""
        config = replace(self)
        object.__setattr__(config, "_given", frozenset(names))
        return config.with_tuning(self._tuning)

    def with_tuning(self, tuning: Tuning) -> TrainConfig:
        """Return the same settings, and note which are tuned for a preset's algorithm."""
        config = replace(self)
        object.__setattr__(config, "_given", self._given)
        object.__setattr__(config, "_tuning", tuning)
        return config

    def with_algorithm_defaults(self) -> TrainConfig:
        """Return the same settings; what a preset has tuned for another algorithm is open again."""
        if self.algorithm == self._tuning.algorithm:
            return self
        defaults = TrainConfig().flat()
        return self.changed(**{name: defaults[name] for name in self._tuning.settings}).with_given(self._given)

    def changed(self, **settings: Any) -> TrainConfig:
        """Return a configuration with other values of some settings, by name; a list will do for a tuple.

        Raises:
            ValueError: for a name that is no setting, or a value that is not valid.
        """
        settings = {name: from_python(name, value) for name, value in settings.items()}
        groups = {one.name: getattr(self, one.name) for one in fields(TrainConfig)}
        owners = {name: group for group, value in groups.items() if is_dataclass(value) for name in vars(value)}
        own = {name: value for name, value in settings.items() if name in groups}
        for name, value in settings.items():
            if name in owners:
                group = own.get(owners[name], groups[owners[name]])
                own[owners[name]] = replace(group, **{name: value})
            elif name not in groups:
                raise ValueError(f"there is no setting {name!r}{did_you_mean(name, [*groups, *owners])}")
        config = replace(self, **own).with_given(self._given | settings.keys())
        return config.with_tuning(self._tuning.without(settings))

    def resolved(self, processes: int = 1) -> TrainConfig:
        """Return the settings with every open one filled in, once they fit together.

        What a preset has tuned for another algorithm counts as open, unless the user gave it.

        Args:
            processes: number of processes that divide every batch among them; sizes are totals.

        Raises:
            ValueError: naming the setting, its value and what is valid; for sizes that do not divide, the nearest that
                do.
        """
        own = self.with_algorithm_defaults()
        training, total, defaults = own.training, self.samples_per_iteration, self.traits
        batch = training.sample_batch_size or largest_divisor(total, 72)
        config = own.changed(
            iterations=self.iterations or _ITERATIONS,
            schedule_iterations=self.optimizer.schedule_iterations or self.iterations or _ITERATIONS,
            learning_rate=own.learning_rate or defaults.learning_rate,
            sample_batch_size=batch,
            samples_per_prompt=training.samples_per_prompt or largest_divisor(batch, 8),
            updates_per_iteration=training.updates_per_iteration
            or largest_divisor(total, defaults.updates_per_iteration),
            epochs=training.epochs or defaults.epochs,
            advantage=training.advantage or self.default_advantage,
        ).with_given(own._given)
        check_trainable(config.run.quantization, config.policy)
        config.training.check_algorithm(config.algorithm, config.reward, config.policy.critic)
        if self.traits.differentiates_reward:
            config._check_backpropagation()
        config._check_sizes(processes)
        parse_options(self.reward_options)
        parse_options(self.run.pipeline_arguments, "pipeline_arguments")
        self.run.check_holdout(config.total_iterations if self.resume is None else None)
        return config

    @property
    def traits(self) -> AlgorithmTraits:
        """What the algorithm is."""
        return ALGORITHMS[self.algorithm]

    @property
    def default_advantage(self) -> Advantage:
        """The advantage where it is left open."""
        if self.traits.needs_group_advantage:
            return "group"
        return "gae" if self.policy.critic else "per_prompt"

    @property
    def total_iterations(self) -> int:
        """Number of iterations of a resolved configuration."""
        assert self.iterations is not None
        return self.iterations

    @property
    def schedule_length(self) -> int:
        """Number of iterations over which the learning rate of a resolved configuration falls."""
        assert self.optimizer.schedule_iterations is not None
        return self.optimizer.schedule_iterations

    @property
    def trained_steps(self) -> int:
        """Steps of each trajectory that are trained on, if the model's last step has noise."""
        return self.count_trained_steps(self.policy.stochastic_steps(self.num_inference_steps))

    def count_trained_steps(self, stochastic: npt.NDArray[np.bool_]) -> int:
        """Return how many steps of each trajectory are trained on in the first iteration, at least 1.

        Args:
            stochastic: which steps have noise, `(steps,)`. An algorithm of the forward process trains on others too.
        """
        steps = len(stochastic)
        start, end = self.update.trained_range(steps)
        candidates = end - start
        if self.traits.needs_log_probs:  # the others train on steps without noise too
            start, end = self.update.noise_window_at(0, steps) or (start, end)
            candidates = int(stochastic[start:end].sum())
        return max(1, min(round(self.update.timestep_fraction * steps), candidates))

    @property
    def trained_samples(self) -> int:
        """Samples of an iteration that are trained on: all, two of a prompt, or the best of different rewards."""
        total, training = self.samples_per_iteration, self.training
        if self.traits.samples == "pairs":
            return 2 * total // training.samples_per_prompt
        fraction = training.rwr_percentile / 100 if self.traits.samples == "best" else 0
        return total - math.ceil(fraction * (total - 1))

    @property
    def eval_batch_size(self) -> int:
        """Held-out samples that are generated at once, by all processes together."""
        return min(self.run.eval_samples, self.training.sample_batch_size)

    def as_dict(self) -> dict[str, Any]:
        """Return every setting as plain values, for `config.yaml`."""
        return _plain(asdict(self))

    @classmethod
    def read(cls, run_dir: Path, setting: str = "resume") -> TrainConfig:
        """Return the configuration of the run in a folder.

        Args:
            run_dir: the folder.
            setting: what named it, for the message.

        Raises:
            ValueError: if the folder is not a run's.
        """
        path = run_dir / "config.yaml"
        if not path.is_file():
            raise ValueError(f"{setting} must be the folder of a run, with a config.yaml; got {str(run_dir)!r}")
        try:
            config = cls.from_dict(read_plain_yaml(path))
            every = {name for name in cls().flat() if not name.endswith("_sha256")}
            if missing := sorted(every - config._given):
                raise ValueError(f"it must hold every setting; {', '.join(missing)} is missing")
        except (OSError, ValueError) as error:
            raise ValueError(f"{setting}: {str(path)!r} does not hold the settings of a run: {error}") from error
        return config

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Return the configuration that `as_dict` wrote; settings that are left out have their defaults.

        Raises:
            ValueError: if it holds something else.
        """
        own = vars(cls())
        groups = {name for name, value in own.items() if is_dataclass(value)}
        flat: dict[str, Any] = {}
        for name, value in values.items() if isinstance(values, Mapping) else ():
            if isinstance(value, Mapping) and name not in own:
                raise ValueError(f"there is no group of settings {name!r}{did_you_mean(name, groups)}")
            if isinstance(value, Mapping) != (name in groups):
                what = "a group of settings" if name in groups else "a setting and no group of them"
                raise ValueError(f"{name} must be {what}; got {shown(value)}")
            inner = value if isinstance(value, Mapping) else {name: value}
            if twice := sorted(flat.keys() & inner.keys()):
                raise ValueError(f"{', '.join(twice)} must occur once")
            flat |= inner
        if "model" not in flat:
            raise ValueError("it holds no settings of a run")
        return train_config(**flat)

    def check_noise(self, stochastic: npt.NDArray[np.bool_]) -> None:
        """Refuse settings that need noise where there is none.

        Args:
            stochastic: which steps have noise, `(steps,)`.

        Raises:
            ValueError: naming the setting.
        """
        needs = self.traits.needs_log_probs, self.traits.penalises_steps
        check_noise(self.update, stochastic, self.algorithm, *needs)

    def check_prompt_images(self, has_images: bool) -> None:
        """Refuse prompts whose images the pipeline gets, for an algorithm that gives the reward only their texts.

        Raises:
            ValueError: naming the prompts.
        """
        if has_images and self.traits.differentiates_reward:
            raise ValueError(
                f"prompts must have no images that the pipeline gets with algorithm {self.algorithm}, whose reward is "
                f"given only the text of each; got {self.prompts!r}"
            )

    def _check_backpropagation(self) -> None:
        """Refuse what training by the reward's gradient cannot use."""
        training, steps = self.training, self.num_inference_steps
        check_differentiable_names(self.reward)
        self.check_prompt_images(str(self.run.size[1].get("image")).startswith("prompt:"))
        for name, (is_valid, valid) in {
            "noise_window": (self.update.noise_window is None, "None, as it trains other steps"),
            "draft_steps": (training.draft_steps <= steps, f"at most num_inference_steps={steps}"),
            "train_batch_size": (training.train_batch_size > 0, "at least 1, as nobody measures its decoder"),
        }.items():
            if not is_valid:
                raise ValueError(f"{name} must be {valid}, with algorithm {self.algorithm}; got {self.flat()[name]!r}")

    def _check_sizes(self, processes: int) -> None:
        training, total = self.training, self.samples_per_iteration
        must_divide("sample_batch_size", training.sample_batch_size, "samples_per_iteration", total)
        must_divide("samples_per_prompt", training.samples_per_prompt, "sample_batch_size", training.sample_batch_size)
        must_divide("updates_per_iteration", training.updates_per_iteration, "samples_per_iteration", total)
        pairs = self.trained_samples // 2
        if self.traits.samples == "pairs" and training.updates_per_iteration > pairs:
            raise ValueError(
                f"updates_per_iteration must be at most {pairs} with {self.algorithm}, which has one pair for each "
                f"prompt of an iteration; got {training.updates_per_iteration}"
            )
        stochastic = self.policy.stochastic_steps(self.num_inference_steps)
        self.check_noise(stochastic)
        if training.shared_noise and not stochastic.any():
            raise ValueError(
                "shared_noise must be False with a sampler without noise, which would make all samples of a prompt the "
                "same; got True"
            )
        if training.shared_noise and training.samples_per_prompt < 2:
            raise ValueError(
                "samples_per_prompt must be at least 2 with shared_noise, which is noise that samples of a prompt "
                f"share; got {training.samples_per_prompt}"
            )
        for name, value in (
            ("samples_per_iteration", total),
            ("sample_batch_size", training.sample_batch_size),
            ("eval_samples", self.eval_batch_size),
        ):
            if value % processes:
                raise ValueError(f"{name} must be a multiple of the number of processes, {processes}; got {value}")


def train_config(**settings: Any) -> TrainConfig:
    """Return a configuration with the given settings, by name, and defaults for the others.

    Raises:
        ValueError: for a name that is no setting, or a value that is not valid.
    """
    return TrainConfig().changed(**settings)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value
