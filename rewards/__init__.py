"""How good a finished sample is: the built-in rewards, and the functions that call a reward and check its answer.

In come decoded images (or other arrays), their prompts and metadata; out come one score per sample and details.
"""

from rewards.differentiable import (
    DIFFERENTIABLE_REWARDS,
    DifferentiableReward,
    check_differentiable_names,
    score_with_gradient,
)
from rewards.formulas.jpeg import jpeg_compressibility, jpeg_incompressibility
from rewards.kinds import SampleKind, are_images, images_only, kind_of, kinds_of, takes
from rewards.protocol import (
    AsksPeople,
    ChecksPrompts,
    Details,
    Freezable,
    Images,
    Loadable,
    LogsAnswers,
    Metadata,
    NonFinite,
    Reward,
    Samples,
    StatefulReward,
    TwoStageReward,
    Unloadable,
    combine_measurements,
    evaluate_reward,
    measure_reward,
    reward_name,
)
from rewards.registry import BUILTIN_REWARDS, configured_reward, load_reward, parse_options, per_sample
from rewards.sums.composite import (
    asking_people,
    check_differentiable,
    check_prompts,
    check_shareable,
    is_stateful,
)
from rewards.sums.terms import weights_by_term

__all__ = [
    "BUILTIN_REWARDS",
    "DIFFERENTIABLE_REWARDS",
    "AsksPeople",
    "ChecksPrompts",
    "Details",
    "DifferentiableReward",
    "Freezable",
    "Images",
    "Loadable",
    "LogsAnswers",
    "Metadata",
    "NonFinite",
    "Reward",
    "SampleKind",
    "Samples",
    "StatefulReward",
    "TwoStageReward",
    "Unloadable",
    "are_images",
    "asking_people",
    "check_differentiable",
    "check_differentiable_names",
    "check_prompts",
    "check_shareable",
    "combine_measurements",
    "configured_reward",
    "evaluate_reward",
    "images_only",
    "is_stateful",
    "jpeg_compressibility",
    "jpeg_incompressibility",
    "kind_of",
    "kinds_of",
    "load_reward",
    "measure_reward",
    "parse_options",
    "per_sample",
    "reward_name",
    "score_with_gradient",
    "takes",
    "weights_by_term",
]
