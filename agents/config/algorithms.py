"""What every algorithm is, as far as settings, plan and run ask: a new one is a row of this table and a class.

The rows name the classes and do not import them, because a command line is read without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

GroupAdvantage = Literal["group", "dr_grpo", "global_std", "gdpo", "leave_one_out"]
"""Advantages that compare a sample with the others of its prompt in the iteration."""
Advantage = Literal["per_prompt", "batch", GroupAdvantage, "gae"]


@dataclass(frozen=True, kw_only=True)
class AlgorithmTraits:
    """What an algorithm is.

    Attributes:
        made_by: its class, `module:class` inside `agents.algorithms`.
        learning_rate: the default, like the next two; `updates_per_iteration` at most.
        always_one: those of the two numbers that must be 1, because the class has no such argument.
        why_one: the reason, for the error.
        arguments: settings that it reads, and the argument of the class that gets each.
        fixed: other arguments of the class.
        keeps: arguments that share a name with a setting but mean something else; they keep this default.
        samples: of an iteration that it trains on: all, the best ones, or the best and the worst of each prompt.
        trains_on_steps: whether an update counts steps of samples, and not samples.
        has_ratio: whether the loss compares log-probabilities with those of the policy that sampled.
        needs_log_probs: whether the loss trains on log-probabilities, which steps without noise do not have.
        penalises_steps: whether the penalty is the divergence of the sampler's steps, which needs noise in them.
        needs_group_advantage: whether the advantage must be one of `GroupAdvantage`.
        takes_critic: whether a critic learns beside it.
        differentiates_reward: whether the loss is the reward, through the last steps; it has no advantage then.
        compares_with: denoisers that the loss runs too: the pretrained one or a lagging one in every call, the one that
            sampled in every call after the first update.
    """

    made_by: str
    learning_rate: float
    epochs: int = 1
    updates_per_iteration: int = 1
    always_one: tuple[str, ...] = ()
    why_one: str = ""
    arguments: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    keeps: Mapping[str, Any] = field(default_factory=dict)
    samples: Literal["all", "best", "pairs"] = "all"
    trains_on_steps: bool = True
    has_ratio: bool = False
    needs_log_probs: bool = True
    penalises_steps: bool = True
    needs_group_advantage: bool = False
    takes_critic: bool = True
    differentiates_reward: bool = False
    compares_with: tuple[Literal["pretrained", "lagging", "sampling"], ...] = ()


_RATIO = {name: name for name in ("clip_range", "trust_region", "divergence_limit")}
_with_ratio = partial(AlgorithmTraits, learning_rate=2e-3, updates_per_iteration=4, arguments=_RATIO, has_ratio=True)
_regression = partial(AlgorithmTraits, made_by="rwr:RWR", trains_on_steps=False, needs_log_probs=False)
_on_noised = partial(
    AlgorithmTraits, learning_rate=3e-3, needs_log_probs=False, penalises_steps=False, takes_critic=False
)
_CLIP = {"advantage_clip": "advantage_clip"}

ALGORITHMS = {
    "ppo": _with_ratio(made_by="policy_gradient.ppo:PPO"),
    "grpo": _with_ratio(made_by="policy_gradient.grpo:GRPO", needs_group_advantage=True),
    "reinforce": AlgorithmTraits(
        made_by="policy_gradient.reinforce:REINFORCE",
        learning_rate=1e-2,
        always_one=("epochs", "updates_per_iteration"),
        why_one="whose gradient is correct only for the policy that sampled",
    ),
    "rwr": _regression(learning_rate=2e-3, epochs=5, arguments={"rwr_beta": "beta", "rwr_per_prompt": "weighting"}),
    "rwr_sparse": _regression(
        learning_rate=5e-4,
        epochs=50,
        always_one=("updates_per_iteration",),
        why_one="which imitates few samples in many epochs",
        arguments={"rwr_percentile": "percentile"},
        fixed={"weighting": "percentile"},
        samples="best",
    ),
    "nft": _on_noised(made_by="forward.nft:NFT", arguments={"nft_beta": "beta", **_CLIP}, compares_with=("lagging",)),
    "awm": _on_noised(
        made_by="forward.awm:AWM",
        arguments=_CLIP,
        keeps={"clip_range": 1.0},
        compares_with=("lagging", "sampling"),
    ),
    "dpo": _on_noised(
        made_by="forward.dpo:DPO", arguments={"dpo_beta": "beta"}, samples="pairs", compares_with=("pretrained",)
    ),
    "draft": AlgorithmTraits(
        made_by="draft:DRaFT",
        learning_rate=5e-3,
        updates_per_iteration=4,
        arguments={"draft_steps": "last_steps"},
        trains_on_steps=False,
        needs_log_probs=False,
        penalises_steps=False,
        takes_critic=False,
        differentiates_reward=True,
        compares_with=("sampling",),
    ),
}
"""Epochs and updates from the papers. The learning rates of reinforce and rwr are from a search on the bundled model
(`scripts/experiments/algorithms.py`). For ppo it found 5e-3, by the reward alone; 2e-3 keeps the animals in the images
(docs/paper.md). nft and awm have what is best on alignment with few iterations. dpo has the largest of three
rates, which is the best of them on four tasks (docs/race.md). Nobody has searched for draft."""

if TYPE_CHECKING:
    Algorithm: TypeAlias = str
else:
    Algorithm = Literal[tuple(ALGORITHMS)]


def _algorithms(has: Callable[[AlgorithmTraits], bool]) -> dict[str, tuple[Any, ...]]:
    return {"algorithm": tuple(name for name, traits in ALGORITHMS.items() if has(traits))}


def _not_reading(setting: str) -> dict[str, tuple[Any, ...]]:
    return _algorithms(lambda traits: setting not in traits.arguments)


_NO_ADVANTAGE = _algorithms(lambda traits: traits.differentiates_reward)
_STATISTICS = _NO_ADVANTAGE | {"advantage": tuple(name for name in get_args(Advantage) if name != "per_prompt")}
_MOVES: dict[str, tuple[Any, ...]] = {"noise_window": (None,)}

WITHOUT_EFFECT = {
    "clip_range": _not_reading("clip_range") | {"trust_region": ("dppo",)},
    "divergence_limit": _not_reading("divergence_limit") | {"trust_region": ("clip", "guard")},
    "advantage": _NO_ADVANTAGE,
    "advantage_clip": _NO_ADVANTAGE | {"advantage": ("dr_grpo", "leave_one_out", "gae")},
    "stat_buffer_size": _STATISTICS,
    "stat_min_count": _STATISTICS,
    "target_kl": _algorithms(lambda traits: {"epochs", "updates_per_iteration"} <= {*traits.always_one}),
    "timestep_fraction": _algorithms(lambda traits: not traits.trains_on_steps),
    "timestep_window": _algorithms(lambda traits: not (traits.trains_on_steps or traits.differentiates_reward)),
    "recompute_log_probs": _algorithms(lambda traits: not traits.penalises_steps),
    "noise_window_iterations": _MOVES,
    "noise_window_stride": _MOVES,
    "schedule_iterations": {"learning_rate_schedule": ("constant",)},
    "lora_targets": {"lora_rank": (0,)},
}
"""For each setting: the other settings that can make it useless, and the values with which they do. With draft,
`timestep_window` still decides which steps are measured, and nothing else."""
NEVERTHELESS: dict[str, dict[str, Any]] = {
    "timestep_window": {"noise_window": None, "kl_coef": 0.0, "target_kl": None},
    "recompute_log_probs": {"target_kl": None},
}
"""For some settings of the table above: settings that make it useful after all, unless they have these values."""
_OWN = dict.fromkeys(name for traits in ALGORITHMS.values() for name in traits.arguments)
# An algorithm that does not read `trust_region` takes only its default: see `TrainingSettings.check_algorithm`.
WITHOUT_EFFECT |= {name: _not_reading(name) for name in _OWN if name not in ("trust_region", *WITHOUT_EFFECT)}
