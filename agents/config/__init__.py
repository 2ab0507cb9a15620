"""Every setting of a training run: settings come in by name, a checked and complete `TrainConfig` goes out."""

from agents.config.presets import PRESETS, preset_config
from agents.config.train_config import TrainConfig, train_config

__all__ = ["PRESETS", "TrainConfig", "preset_config", "train_config"]
