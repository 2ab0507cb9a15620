"""The groups of settings that belong to a training run and to none of its parts.

Sizes count samples. One sample is one trajectory of `num_inference_steps` transitions and its final image.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from agents.algorithms.options import BETA, DPO_BETA, LAST_STEPS, PERCENTILE, NonFiniteRewards, TrustRegion
from agents.config.algorithms import ALGORITHMS, Advantage, Algorithm, GroupAdvantage
from ddpo_env.validation.choices import Quantization
from ddpo_env.validation.options import DECAY, Range, check_fields, shown
from ddpo_env.validation.resolution import Resolution, plain_resolution
from rewards import parse_options, weights_by_term

MOST = Range(at_least=1, at_most=1_000_000)
"""Numbers of samples, steps and iterations."""
MOST_OR_0 = Range(at_least=0, at_most=1_000_000)
SEED = Range(at_least=0, at_most=4_000_000_000)
"""NumPy takes seeds below 2**32; this leaves room for the sub-environments and the held-out samples, which follow."""
LEAST_PAIRS = 8
"""Smallest number of held-out samples for which two standard errors mean something: a value is that far above zero by
chance in 4 % of cases with 8 samples, and in 2.4 % with 90."""
LEAST_EVALUATIONS = 7
"""Smallest number of evaluations with which a slope of the held-out reward can be compared with the one before."""
_SIZE = Range(above=0, at_most=1e6)

_PAIRS = {
    "reward_options": "model=tiny",
    "holdout_reward_options": "model=tiny",
    "pipeline_arguments": "num_frames=17",
}
"""Settings that are key=value, with an example of each."""

Dtype = Literal["auto", "float32", "float16", "bfloat16"]
Schedule = Literal["constant", "linear", "cosine"]


def from_python(name: str, value: Any) -> Any:
    """Return a value that Python code gave a setting, with a tuple for a list.

    Raises:
        ValueError: for a function as a reward, or options that are no sequence; the message shows how both are written.
    """
    if name in ("reward", "holdout_reward") and callable(value):
        raise ValueError(
            f"{name} must be text: the name of a built-in reward, or of your own such as 'my_module:function', which a "
            f"resumed run can find again; got {shown(value)}"
        )
    value = tuple(value) if isinstance(value, list) else value
    if name in _PAIRS and not isinstance(value, tuple):
        raise ValueError(
            f"{name} must be a list or a tuple of key=value, such as [{_PAIRS[name]!r}]; got {shown(value)}"
        )
    return value


class _Checked:
    """Settings that are checked when they are made."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(_Checked):
    """Sizes of an iteration, advantages, and what an algorithm needs."""

    samples_per_prompt: Annotated[int, MOST_OR_0] = 0
    """Consecutive samples that share a prompt. 0: the largest divisor of the sample batch size, up to 8."""
    shared_noise: bool = False
    """Samples in a row that share a prompt start from the same noise. What they have in common, until the first step
    with noise, is computed once: with noise_window this saves a part of the sampling (MixGRPO)."""
    sample_batch_size: Annotated[int, MOST_OR_0] = 0
    """Samples generated at once. 0: the largest divisor of the samples per iteration, up to 72."""
    train_batch_size: Annotated[int, MOST_OR_0] = 45
    """(sample, timestep) pairs in one training call, with dpo at least two, or samples with rwr and draft; gradients
    add up. 0: as many as fit into the memory."""
    updates_per_iteration: Annotated[int, MOST_OR_0] = 0
    """Optimizer steps in each epoch of an iteration. 0: the largest divisor of its samples up to 4 with ppo, grpo and
    draft; else 1."""
    epochs: Annotated[int, MOST_OR_0] = 0
    """Passes over an iteration's samples. 0: the paper's 1; 5 for rwr and 50 for rwr_sparse."""
    clip_range: Annotated[float, _SIZE] = 3e-3
    """PPO's ε. It is tiny because log-probabilities are averaged over the latent, and depends on the latent's size."""
    trust_region: TrustRegion = "clip"
    """How ppo and grpo keep an update near the policy that sampled: clip; guard (GRPO-Guard), whose ratio has the same
    spread at every timestep; dppo (Flow-DPPO), which drops steps that have moved too far."""
    divergence_limit: Annotated[float, _SIZE] = 1e-5
    """dppo may drop a step whose mean has moved further than this (half the squared distance in standard deviations,
    mean over the latent)."""
    advantage: Advantage | None = None
    """How a sample is rated. Default: group with grpo, else gae with a critic, else per_prompt (statistics of its
    prompt). dr_grpo: group without its standard deviation; global_std: with that of all samples; gdpo: each term of a
    weighted sum of rewards for itself. draft has none."""
    advantage_clip: Annotated[float, _SIZE] = 5.0
    """Standardised advantages (not dr_grpo, leave_one_out, gae) are clipped to plus/minus this. With nft and awm it is
    the advantage with the largest effect."""
    stat_buffer_size: Annotated[int, MOST] = 32
    """Rewards kept per prompt, for its mean and standard deviation."""
    stat_min_count: Annotated[int, Range(at_least=2, at_most=1_000_000)] = 8
    """Rewards that a prompt needs before its own statistics replace the iteration's."""
    rwr_beta: Annotated[float, _SIZE] = 1.0
    """Exponent of the weights in reward-weighted regression, per standard deviation of the reward."""
    rwr_per_prompt: bool = False
    """Weights of rwr have mean 1 within each prompt, as in the paper's aesthetic experiment, not over all samples."""
    rwr_percentile: Annotated[float, PERCENTILE] = 90.0
    """Sparse reward-weighted regression imitates the samples from this percentile of the rewards on."""
    nft_beta: Annotated[float, BETA] = 1.0
    """How far nft's better and worse policies are from the one that samples; its paper has 0.1 for text rendering."""
    draft_steps: Annotated[int, LAST_STEPS] = 1
    """Last steps of a trajectory that draft differentiates: its K."""
    dpo_beta: Annotated[float, DPO_BETA] = 2000.0
    """How strongly dpo compares the denoising losses of a prompt's best and worst sample."""
    non_finite_rewards: NonFiniteRewards = "raise"
    """A reward that is NaN or infinite is an error (raise), or its sample is dropped and counted (drop)."""

    def check_algorithm(self, algorithm: Algorithm, reward: str, has_critic: bool) -> None:
        """Refuse settings, every one filled in, that do not fit the algorithm.

        Raises:
            ValueError: naming the setting.
        """
        traits = ALGORITHMS[algorithm]
        if has_critic and not traits.takes_critic:
            raise ValueError(f"critic must be False with {algorithm}, which has no use for values; got True")
        if self.advantage == "gae" and not traits.takes_critic:
            raise ValueError(f"advantage must not be gae with {algorithm}, which takes no critic; got 'gae'")
        if self.advantage == "gae" and not has_critic:
            raise ValueError("advantage must not be gae without a critic: add --critic")
        if self.trust_region != "clip" and not traits.has_ratio:
            raise ValueError(
                f"trust_region must be clip with {algorithm}, which has no importance ratio of the sampler's steps; "
                f"got {self.trust_region!r}"
            )
        in_groups = get_args(GroupAdvantage)
        if traits.needs_group_advantage and self.advantage not in in_groups:
            raise ValueError(
                f"advantage must be one of {', '.join(in_groups)} with {algorithm}, which compares samples of a "
                f"prompt; got {self.advantage!r}"
            )
        if self.advantage == "gdpo":
            weights_by_term(reward, "advantage gdpo")
        by_votes = "votes" in {term.partition(":")[0].strip() for term in reward.split(",")}
        comparing = {
            algorithm: traits.samples == "pairs",
            "reward votes": by_votes,
            "rwr_per_prompt": self.rwr_per_prompt,
            f"advantage {self.advantage}": self.advantage in in_groups,
        }
        names = [name for name, compares in comparing.items() if compares]
        if names and self.samples_per_prompt < 2:
            raise ValueError(
                f"samples_per_prompt must be at least 2 with {names[0]}, which compares samples of a prompt; "
                f"got {self.samples_per_prompt}"
            )
        if comparing[algorithm] and self.train_batch_size == 1:
            raise ValueError(
                f"train_batch_size must be 0 or at least 2 with {algorithm}, which trains on two samples at once; got 1"
            )
        sizes = {name: getattr(self, name) for name in traits.always_one}
        if any(size != 1 for size in sizes.values()):
            raise ValueError(
                f"{' and '.join(sizes)} must be 1 with {algorithm}, {traits.why_one}; "
                f"got {' and '.join(map(str, sizes.values()))}"
            )
        if self.stat_min_count > self.stat_buffer_size:
            raise ValueError(
                f"stat_min_count must be between 2 and stat_buffer_size={self.stat_buffer_size}; "
                f"got {self.stat_min_count}"
            )


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(_Checked):
    """AdamW on the weights that learn."""

    learning_rate_schedule: Schedule = "linear"
    """linear and cosine fall to almost 0 at the last iteration."""
    schedule_iterations: Annotated[int | None, MOST] = None
    """Iterations over which the learning rate falls; then it stays. Default: the number that the run started with."""
    adam_beta1: Annotated[float, DECAY] = 0.9
    """Decay of the average gradient."""
    adam_beta2: Annotated[float, DECAY] = 0.99
    """Decay of the average squared gradient; 0.99 adapts within short runs."""
    adam_epsilon: Annotated[float, Range(above=0, at_most=1)] = 1e-10
    """Added to the root of the average squared gradient, which is below 1e-8 for many weights."""
    weight_decay: Annotated[float, Range(at_least=0, at_most=1e4)] = 1e-4
    """Decoupled weight decay."""
    max_grad_norm: Annotated[float, _SIZE] = 1.0
    """Gradients are clipped to this norm."""


@dataclass(frozen=True, kw_only=True)
class RunSettings(_Checked):
    """Precision, memory, evaluation, and when a run stops."""

    dtype: Dtype = "auto"
    """Dtype of the frozen weights. auto: bfloat16 on an accelerator that has it, else float32. The weights that learn
    are always float32."""
    resolution: int | str | None = None
    """Size of the images in pixels, such as 512, or 832x1216 for width x height. Default: the model's own."""
    pipeline_arguments: tuple[str, ...] = ()
    """Arguments of every call of the model's pipeline as key=value, such as num_frames=17."""
    quantization: Quantization | None = None
    """Hold the frozen denoiser's linear layers in 8 bits (int8) or 4 (nf4); the LoRA on top stays float32."""
    base_lora: Path | None = None
    """File or folder of a LoRA that is merged into the frozen weights, those of the text encoders too. The LoRA that is
    saved contains it."""
    offload_text_encoder: bool | None = None
    """Keep the text encoders on the accelerator only while they encode. Default: yes; no effect on a CPU."""
    vae_tiling: bool = False
    """Decode images one at a time, and images larger than the VAE's own size in overlapping tiles: less memory."""
    eval_samples: Annotated[int, MOST] = 90
    """Samples from held-out seeds that are scored before, during and after training."""
    eval_interval: Annotated[int, MOST_OR_0] = 5
    """Iterations between evaluations; 0: only before and after training."""
    holdout_reward: str | None = None
    """Second reward, written like --reward, that scores the held-out samples of every evaluation. Nothing is trained on
    it: where it falls while the reward rises, the run over-optimises. It decides which policy is kept in best/."""
    holdout_reward_options: tuple[str, ...] = ()
    """Arguments of the held-out reward, written like --reward-options."""
    stop_at_overoptimisation: bool = False
    """End the run when the held-out reward falls, or when it rises less than half as fast as before while the reward
    rises, by more than chance. It needs --holdout-reward and at least seven evaluations."""
    checkpoint_interval: Annotated[int, MOST_OR_0] = 1
    """Iterations between checkpoints; 0: only at the end. A run that Ctrl-C or an error stops writes one too."""
    stop_on_divergence: bool = True
    """End a run with an error if three iterations in a row are three standard deviations worse than the first."""
    process_timeout: Annotated[float, Range(above=0, at_most=30 * 86_400)] = 1800.0
    """Seconds that processes wait for each other before the run ends; a batch's reward must take less."""
    model_sha256: Annotated[str | None, tyro.conf.Suppress] = None
    """Hash of the files of the model, if it is a folder: a resumed run takes no other model of the same name."""
    prompts_sha256: Annotated[str | None, tyro.conf.Suppress] = None
    """Hash of the prompt file, if there is one."""
    lora_sha256: Annotated[str | None, tyro.conf.Suppress] = None
    """Hash of the file of `lora`."""
    base_lora_sha256: Annotated[str | None, tyro.conf.Suppress] = None
    """Hash of the file of `base_lora`."""

    def __post_init__(self) -> None:
        if isinstance(self.base_lora, str) and self.base_lora:
            object.__setattr__(self, "base_lora", Path(self.base_lora))
        super().__post_init__()
        object.__setattr__(self, "resolution", plain_resolution(self.resolution))

    @property
    def size(self) -> tuple[Resolution | None, dict[str, Any]]:
        """The resolution, and the arguments of the pipeline's call."""
        return self.resolution, parse_options(self.pipeline_arguments, "pipeline_arguments")

    def check_holdout(self, iterations: int | None) -> None:
        """Refuse settings of the held-out reward that do not fit together.

        Args:
            iterations: of the run; `None`: any number, because a resumed run may end sooner than it was planned.

        Raises:
            ValueError: naming the setting.
        """
        parse_options(self.holdout_reward_options, "holdout_reward_options")
        if self.holdout_reward_options and self.holdout_reward is None:
            raise ValueError(
                "holdout_reward_options must be empty without holdout_reward, whose arguments they are; got "
                f"{' '.join(self.holdout_reward_options)}"
            )
        if not self.stop_at_overoptimisation:
            return
        if self.holdout_reward is None:
            raise ValueError(
                "stop_at_overoptimisation needs a reward that is not trained on: add --holdout-reward with another "
                "reward, such as aesthetic"
            )
        if self.eval_interval == 0:
            raise ValueError(
                "eval_interval must be at least 1 with stop_at_overoptimisation, which decides at evaluations; got 0"
            )
        if self.eval_samples < LEAST_PAIRS:
            raise ValueError(
                f"eval_samples must be at least {LEAST_PAIRS} with stop_at_overoptimisation, which needs the standard "
                f"error of their differences; got {self.eval_samples}"
            )
        if iterations is not None:
            self._check_evaluations(iterations)

    def _check_evaluations(self, iterations: int) -> None:
        """Refuse a run with too few evaluations for `stop_at_overoptimisation`, which could never end it."""
        intervals = LEAST_EVALUATIONS - 1
        if self.eval_interval <= iterations // intervals:
            return
        if iterations < intervals:
            raise ValueError(
                f"iterations must be at least {intervals} with stop_at_overoptimisation, which needs "
                f"{LEAST_EVALUATIONS} evaluations; got {iterations}"
            )
        raise ValueError(
            f"eval_interval must be at most {iterations // intervals} with stop_at_overoptimisation, which needs "
            f"{LEAST_EVALUATIONS} evaluations in {iterations} iterations; got {self.eval_interval}"
        )
