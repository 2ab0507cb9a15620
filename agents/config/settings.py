"""Every setting of a training run, grouped as `--help` shows them; `agents.config.train_config` refuses what does not fit.

Sizes are stated in samples: one sample is one picture, that is one trajectory of `num_inference_steps` transitions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from agents.algorithms.rollout_algorithm import NonFiniteRewards
from agents.config.sizes import largest_divisor
from agents.policy.lora import LoraTargets

Dtype = Literal["auto", "float32", "float16", "bfloat16"]
Algorithm = Literal["ppo", "reinforce", "rwr", "rwr_sparse"]
Advantage = Literal["per_prompt", "batch", "group", "leave_one_out", "gae"]
Schedule = Literal["constant", "linear", "cosine"]


class AlgorithmDefaults(NamedTuple):
    """What a setting is for an algorithm where it is left open."""

    learning_rate: float
    epochs: int
    updates_per_iteration: int


ALGORITHMS: dict[str, AlgorithmDefaults] = {
    "ppo": AlgorithmDefaults(5e-3, 1, 4),
    "reinforce": AlgorithmDefaults(1e-2, 1, 1),
    "rwr": AlgorithmDefaults(2e-3, 5, 1),
    "rwr_sparse": AlgorithmDefaults(5e-4, 50, 1),
}
"""Learning rates by the search of `scripts/experiments/algorithms.py` on the bundled model; epochs as in the paper."""


@dataclass(kw_only=True)
class RunSettings:
    """Where the run goes, and what is looked at on the way."""

    preset: str | None = None
    """Defaults of a DDPO experiment: sd14-compressibility, sd14-incompressibility, sd14-aesthetic or sd14-alignment."""
    run_dir: Path | None = None
    """Folder of the run. Default: runs/<reward>-<date>-<time>."""
    resume: Path | None = None
    """Folder of a run to go on with, from its last checkpoint; all other settings but iterations are the run's own."""
    iterations: int | None = None
    """Rounds of sampling and training, in all. Default: 20; for a resumed run, as many as it was begun with."""
    seed: int = 0
    """Of weights, prompts, noise and batches."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    process_timeout: float = 1800.0
    """Seconds that processes wait for each other before the run ends: more than a batch's slowest reward takes."""
    dtype: Dtype = "auto"
    """Of the frozen weights: auto is float32 on a CPU and bfloat16 on an accelerator. What learns is float32."""
    eval_samples: int = 90
    """Pictures from held-out seeds that are scored before, during and after training."""
    eval_interval: int = 5
    """Iterations between evaluations; 0: only before and after."""
    checkpoint_interval: int = 1
    """Iterations between checkpoints; 0: only at the end. A run that stops, by Ctrl-C or an error, writes one too."""
    keep_checkpoints: int = 2
    """How many checkpoints are kept."""


@dataclass(kw_only=True)
class TaskSettings:
    """The Markov decision process: which model draws what, and how it is judged."""

    model: str = "tiny"
    """Bundled name (tiny), a folder in diffusers' layout, or a Hub id such as CompVis/stable-diffusion-v1-4."""
    resolution: int | None = None
    """Side of the pictures in pixels, for text-to-image models. Default: the model's own."""
    reward: str = "jpeg_compressibility"
    """Built-in name, module:function of your own, or a weighted sum."""
    reward_options: tuple[str, ...] = ()
    """Its arguments as key=value, such as device=cpu judge_options.timeout=30; of a weighted sum, part.key=value."""
    prompts: str = "simple_animals"
    """Name of a prompt set, or a text file with a prompt a line."""
    num_inference_steps: int = 10
    """Denoising steps, the length of an episode."""
    offload_text_encoder: bool | None = None
    """Have the text encoders on an accelerator only while they encode. Default: yes; on a CPU there is no effect."""
    vae_tiling: bool = False
    """Decode pictures one at a time, those larger than the VAE's own size in overlapping tiles: less memory."""


@dataclass(kw_only=True)
class PolicySettings:
    """The denoiser as a policy: how it samples, and what of it learns."""

    guidance_scale: float = 1.0
    """Of classifier-free guidance, in sampling and training; 1 is off and halves the cost. DDPO used 5 on SD 1.4."""
    unconditional_gradient: bool = True
    """Whether guidance's unconditional half is differentiated; without, updates are cheaper and not the same."""
    eta: float = 1.0
    """Noise of the DDIM steps: 1 is as noisy as DDPM; must be above 0."""
    noise_level: float | None = None
    """Noise of the steps of flow matching (SD 3, FLUX); must be above 0. Default: Flow-GRPO's 0.7."""
    min_std: float | None = None
    """Lower bound on a step's standard deviation, for samplers whose last step is deterministic."""
    lora_rank: int = 8
    """Rank of the LoRA adapters; 0 trains every weight."""
    lora_targets: LoraTargets = "attention+convolutions"
    """Which layers get an adapter."""
    merge_lora: bool | None = None
    """Sample with the adapters merged into a copy of their layers' weights, which is faster. Default: in float32."""
    log_prob_reduction: Literal["mean", "sum"] = "mean"
    """Of the log-density over the latent's dimensions; the clip range depends on it."""
    critic: bool = False
    """Whether a value network is trained, which generalized advantages need; DDPO has none."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    compile_denoiser: bool = False
    """Run the denoiser by torch.compile: faster calls after minutes of compiling, for long runs."""
    autocast: Literal["bfloat16", "float16"] | None = None
    """Mixed precision of the denoiser's arithmetic. Default: the dtype of the frozen weights."""


@dataclass(kw_only=True)
class TrainingSettings:
    """One iteration: sampling, advantages, updates."""

    algorithm: Algorithm = "ppo"
    """ppo (DDPO-IS), reinforce (DDPO-SF), or reward-weighted regression: rwr (exponential weights), rwr_sparse."""
    advantage: Advantage | None = None
    """How good a picture was. Default: per_prompt (its prompt's running statistics), or gae where there is a critic."""
    samples_per_iteration: int = 72
    """Pictures drawn in an iteration."""
    samples_per_prompt: int = 0
    """Pictures in a row that share a prompt. 0: as many as divide the sample batch size, up to 8."""
    sample_batch_size: int = 0
    """Pictures drawn at once. 0: as many as divide the samples of an iteration, up to 72."""
    train_batch_size: int = 45
    """(sample, timestep) pairs in one call of the denoiser in training, whose gradients add up. 0: as many as fit."""
    updates_per_iteration: int = 0
    """Optimizer steps in an iteration and epoch. 0: with ppo as many as divide its samples, up to 4; else 1."""
    epochs: int = 0
    """Passes over an iteration's samples. 0: the paper's 1, and 5 for rwr, 50 for rwr_sparse."""
    timestep_window: tuple[float, float] = (0.0, 0.9)
    """Part of each trajectory whose steps may be trained on; the last step's gradient is large and says little."""
    timestep_fraction: float = 0.5
    """Share of each trajectory's steps, chosen at random, that is trained on."""
    clip_range: float = 3e-3
    """PPO's ε. With log-densities averaged over the latent it is tiny, and depends on the latent's size: see docs."""
    target_kl: float | None = None
    """Ends an iteration's updates when the KL from the sampling policy exceeds 1.5 times this."""
    kl_coef: float = 0.0
    """Weight of the KL divergence from the pretrained policy in the loss."""
    rwr_beta: float = 1.0
    """Of reward-weighted regression: how much a standard deviation of reward counts, as the weights' exponent."""
    rwr_percentile: float = 90.0
    """Of sparse reward-weighted regression: pictures from this percentile on are imitated."""
    recompute_log_probs: bool | None = None
    """Whether log-densities are computed again before the first update. Default: in half precision, where they vary."""
    ema_decay: float = 0.0
    """Decay of averaged weights, which are then evaluated and saved; 0: none."""
    overlap_rewards: bool = True
    """Compute a batch's rewards while the next batch is being sampled."""
    non_finite_rewards: NonFiniteRewards = "raise"
    """A reward that is NaN or infinite is an error (raise), or its sample is left out and counted (drop)."""
    advantage_clip: float = 5.0
    """Standardised advantages (per_prompt, batch, group) are clipped to plus/minus this."""
    stat_buffer_size: int = 32
    """Rewards remembered a prompt, for its mean and standard deviation."""
    stat_min_count: int = 8
    """Rewards of a prompt before its own statistics are used instead of the iteration's."""

    def __post_init__(self) -> None:
        """Replace the sizes that were left open by numbers that divide."""
        total = self.samples_per_iteration
        self.sample_batch_size = self.sample_batch_size or largest_divisor(total, 72)
        self.samples_per_prompt = self.samples_per_prompt or largest_divisor(self.sample_batch_size, 8)
        defaults = ALGORITHMS.get(self.algorithm, ALGORITHMS["ppo"])
        most_updates = defaults.updates_per_iteration
        self.updates_per_iteration = self.updates_per_iteration or largest_divisor(total, most_updates)
        self.epochs = self.epochs or defaults.epochs


@dataclass(kw_only=True)
class OptimizerSettings:
    """AdamW on what learns."""

    learning_rate: float | None = None
    """At the start of the run. Default: the algorithm's, tuned on the bundled model: 5e-3 for ppo."""
    learning_rate_schedule: Schedule = "linear"
    """What becomes of it: linear and cosine fall to almost 0 at the last iteration."""
    adam_beta1: float = 0.9
    """Decay of the gradient's average."""
    adam_beta2: float = 0.99
    """Decay of the squared gradient's average; 0.99 follows short runs."""
    adam_epsilon: float = 1e-10
    """Added to the root of the squared gradient's average, which is below 1e-8 for many weights: see docs."""
    weight_decay: float = 1e-4
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
