"""How good is the finished picture: built-in rewards, the protocol that they and a user's own follow, and the check."""

from rewards.jpeg import jpeg_compressibility, jpeg_incompressibility
from rewards.options import parse_options
from rewards.protocol import (
    Details,
    Images,
    Metadata,
    NonFinite,
    Reward,
    Samples,
    StatefulReward,
    TwoStageReward,
    are_images,
    evaluate_reward,
    images_only,
    is_images_only,
    per_sample,
    reward_name,
)
from rewards.registry import BUILTIN_REWARDS, configured_reward, load_reward
from rewards.shared import MEASUREMENT, Measurement, SharedReward, shared, unshared

__all__ = [
    "BUILTIN_REWARDS",
    "MEASUREMENT",
    "Details",
    "Images",
    "Measurement",
    "Metadata",
    "NonFinite",
    "Reward",
    "Samples",
    "SharedReward",
    "StatefulReward",
    "TwoStageReward",
    "are_images",
    "configured_reward",
    "evaluate_reward",
    "images_only",
    "is_images_only",
    "jpeg_compressibility",
    "jpeg_incompressibility",
    "load_reward",
    "parse_options",
    "per_sample",
    "reward_name",
    "shared",
    "unshared",
]
