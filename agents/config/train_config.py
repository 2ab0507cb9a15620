"""A whole run's settings: what does not fit together is refused here, before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from agents.algorithms.rollout_algorithm import NonFiniteRewards
from agents.config.settings import (
    ALGORITHMS,
    Advantage,
    OptimizerSettings,
    PolicySettings,
    RunSettings,
    Schedule,
    TaskSettings,
    TrainingSettings,
)
from agents.config.sizes import must_divide
from agents.policy.lora import LORA_TARGETS
from rewards import parse_options

_ITERATIONS = 20


@dataclass(kw_only=True)
class TrainConfig:
    """A whole run of `scripts/train_ppo.py`."""

    run: RunSettings = field(default_factory=RunSettings)
    task: TaskSettings = field(default_factory=TaskSettings)
    policy: PolicySettings = field(default_factory=PolicySettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)

    def check(self) -> None:
        """Refuse what cannot run, before anything is loaded.

        Raises:
            ValueError: naming the setting, its value, and what is valid; for sizes that do not divide, the nearest that
                do.
        """
        self._check_algorithm()
        self._check_ranges()
        self._check_choices()
        training = self.training
        total = training.samples_per_iteration
        must_divide("sample_batch_size", training.sample_batch_size, "samples_per_iteration", total)
        must_divide("samples_per_prompt", training.samples_per_prompt, "sample_batch_size", training.sample_batch_size)
        must_divide("updates_per_iteration", training.updates_per_iteration, "samples_per_iteration", total)

    def _check_ranges(self) -> None:
        training, optimizer = self.training, self.optimizer
        at_least_one = {
            "iterations": self.iterations,
            "eval_samples": self.run.eval_samples,
            "keep_checkpoints": self.run.keep_checkpoints,
            "num_inference_steps": self.task.num_inference_steps,
            "samples_per_iteration": training.samples_per_iteration,
            "samples_per_prompt": training.samples_per_prompt,
            "sample_batch_size": training.sample_batch_size,
            "updates_per_iteration": training.updates_per_iteration,
            "epochs": training.epochs,
        }
        not_negative = {
            "seed": self.run.seed,
            "train_batch_size": training.train_batch_size,
            "eval_interval": self.run.eval_interval,
            "checkpoint_interval": self.run.checkpoint_interval,
            "guidance_scale": self.policy.guidance_scale,
            "lora_rank": self.policy.lora_rank,
            "weight_decay": optimizer.weight_decay,
            "kl_coef": training.kl_coef,
            "rwr_percentile": training.rwr_percentile,
            "ema_decay": training.ema_decay,
        }
        above_zero = {
            "process_timeout": self.run.process_timeout,
            "eta": self.policy.eta,
            "noise_level": 1.0 if self.policy.noise_level is None else self.policy.noise_level,
            "clip_range": training.clip_range,
            "advantage_clip": training.advantage_clip,
            "timestep_fraction": training.timestep_fraction,
            "learning_rate": self.learning_rate,
            "rwr_beta": training.rwr_beta,
            "adam_epsilon": optimizer.adam_epsilon,
            "max_grad_norm": optimizer.max_grad_norm,
            "target_kl": 1.0 if training.target_kl is None else training.target_kl,
        }
        for name, value in at_least_one.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        for name, number in not_negative.items():
            if not 0 <= number < math.inf:
                raise ValueError(f"{name} must be at least 0; got {number}")
        for name, number in above_zero.items():
            if not 0 < number < math.inf:
                raise ValueError(f"{name} must be above 0; got {number}")

    def _check_algorithm(self) -> None:
        training = self.training
        if training.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}; got {training.algorithm!r}")
        if training.advantage not in (None, *get_args(Advantage)):
            raise ValueError(f"advantage must be one of {', '.join(get_args(Advantage))}; got {training.advantage!r}")
        if training.advantage == "gae" and not self.policy.critic:
            raise ValueError("advantage must not be gae without a critic: add --critic")
        if training.advantage in ("group", "leave_one_out") and training.samples_per_prompt < 2:
            raise ValueError(
                f"samples_per_prompt must be at least 2 with advantage {training.advantage}, which compares pictures "
                f"of a prompt; got {training.samples_per_prompt}"
            )
        if training.algorithm == "reinforce" and (training.epochs, training.updates_per_iteration) != (1, 1):
            raise ValueError(
                "epochs and updates_per_iteration must be 1 with reinforce, whose gradient is right for the policy "
                f"that sampled only; got {training.epochs} and {training.updates_per_iteration}"
            )
        if training.algorithm == "rwr_sparse" and training.updates_per_iteration != 1:
            raise ValueError(
                f"updates_per_iteration must be 1 with rwr_sparse, which imitates few pictures, in many epochs; "
                f"got {training.updates_per_iteration}"
            )
        for name, value, below in (
            ("rwr_percentile", training.rwr_percentile, 100),
            ("ema_decay", training.ema_decay, 1),
        ):
            if value >= below:
                raise ValueError(f"{name} must be below {below}; got {value}")

    def _check_choices(self) -> None:
        training, optimizer = self.training, self.optimizer
        parse_options(self.task.reward_options)
        if training.non_finite_rewards not in get_args(NonFiniteRewards):
            valid = ", ".join(get_args(NonFiniteRewards))
            raise ValueError(f"non_finite_rewards must be one of {valid}; got {training.non_finite_rewards!r}")
        if self.policy.autocast not in (None, "bfloat16", "float16"):
            raise ValueError(f"autocast must be None, bfloat16 or float16; got {self.policy.autocast!r}")
        start, end = training.timestep_window
        if not 0 <= start < end <= 1 or self.trained_steps < 1:
            raise ValueError(
                f"timestep_window must be two shares, 0 <= start < end <= 1, with at least one of the "
                f"{self.task.num_inference_steps} steps between them; got {training.timestep_window}"
            )
        if training.timestep_fraction > 1:
            raise ValueError(f"timestep_fraction must be in (0, 1]; got {training.timestep_fraction}")
        if optimizer.learning_rate_schedule not in get_args(Schedule):
            raise ValueError(
                f"learning_rate_schedule must be one of {', '.join(get_args(Schedule))}; "
                f"got {optimizer.learning_rate_schedule!r}"
            )
        for name, beta in {"adam_beta1": optimizer.adam_beta1, "adam_beta2": optimizer.adam_beta2}.items():
            if not 0 <= beta < 1:
                raise ValueError(f"{name} must be in [0, 1); got {beta}")
        if self.policy.lora_targets not in LORA_TARGETS:
            raise ValueError(f"lora_targets must be one of {', '.join(LORA_TARGETS)}; got {self.policy.lora_targets!r}")
        if self.policy.log_prob_reduction not in ("mean", "sum"):
            raise ValueError(f"log_prob_reduction must be mean or sum; got {self.policy.log_prob_reduction!r}")
        if not 2 <= training.stat_min_count <= training.stat_buffer_size:
            raise ValueError(
                f"stat_min_count must be between 2 and stat_buffer_size={training.stat_buffer_size}; "
                f"got {training.stat_min_count}"
            )

    @property
    def iterations(self) -> int:
        """How many there are in all."""
        return _ITERATIONS if self.run.iterations is None else self.run.iterations

    @property
    def learning_rate(self) -> float:
        """At the start of the run."""
        given = self.optimizer.learning_rate
        return ALGORITHMS[self.training.algorithm].learning_rate if given is None else given

    @property
    def trained_steps(self) -> int:
        """Steps of each trajectory that are trained on."""
        training, steps = self.training, self.task.num_inference_steps
        start, end = (round(edge * steps) for edge in training.timestep_window)
        return min(max(1, round(training.timestep_fraction * steps)), end - start)

    def as_dict(self) -> dict[str, Any]:
        """Return every setting in groups of plain values, for `config.yaml`."""
        groups: dict[str, Any] = asdict(self)
        for group in groups.values():
            for name, value in group.items():
                if isinstance(value, Path):
                    group[name] = str(value)
                elif isinstance(value, tuple):
                    group[name] = list(value)
        return groups

    @classmethod
    def from_dict(cls, groups: dict[str, Any]) -> TrainConfig:
        """Return the configuration that `as_dict` wrote.

        Raises:
            ValueError: if that is not what it is.
        """
        try:
            run = {**groups["run"]}
            for name in ("run_dir", "resume"):
                run[name] = Path(run[name]) if run[name] is not None else None
            window = tuple(groups["training"]["timestep_window"])
            options = tuple(groups["task"].get("reward_options", ()))
            return cls(
                run=RunSettings(**run),
                task=TaskSettings(**{**groups["task"], "reward_options": options}),
                policy=PolicySettings(**groups["policy"]),
                training=TrainingSettings(**{**groups["training"], "timestep_window": window}),
                optimizer=OptimizerSettings(**groups["optimizer"]),
            )
        except (TypeError, KeyError) as error:
            raise ValueError(f"settings must be those of this version's TrainConfig: {error}") from error
