"""The model that an exported LoRA belongs to: how a stranger loads it, and how its pipeline is called.

The pipeline is watched on the meta device, so nothing is loaded, and nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from agents.config.content import place_of
from agents.config.train_config import TrainConfig
from agents.output.terminal import escaped
from ddpo_env.models import BUNDLED_MODELS
from ddpo_env.models.families.pipeline_model import PipelineModel
from ddpo_env.models.files.single_file import download_of_configurations
from ddpo_env.models.outline import outline_model
from ddpo_env.models.protocol import DiffusionModel

PACKAGED = "tiny"
"""The bundled model whose files are in the package, so that everybody who installs it has them."""


@dataclass(frozen=True)
class BaseModel:
    """The model without the LoRA.

    Attributes:
        name: Hub id, path, or the name of the bundled model.
        is_on_hub: whether `name` is a Hub id.
        model: on the meta device.
    """

    name: str
    is_on_hub: bool
    model: PipelineModel

    @property
    def pipeline_class(self) -> str:
        """Name of the pipeline's class in diffusers."""
        return type(self.model.pipeline).__name__


def base_model(config: TrainConfig, given: str | None) -> BaseModel:
    """Return the model that a run's LoRA belongs to.

    Args:
        config: of the run.
        given: name that the model card shall give it; `None`: the run's own.

    Raises:
        ValueError: for a model that only this machine has and that has no name for others; or for a Hub id whose
            configurations are not here.
    """
    name = config.model if given is None else given
    if "`" in name or not name.strip() or escaped(name) != name or "\n" in name:
        raise ValueError(f"base_model must be a Hub id, or a folder in diffusers' layout; got {name!r}")
    is_local = given is None and place_of(config, "model") is not None
    if is_local or (name in BUNDLED_MODELS and name != PACKAGED):
        raise ValueError(
            f"base_model must be given, because others do not have the run's model {name!r}: add --base-model with its "
            "Hub id, or with a folder, which the model card then names"
        )
    path = Path(name).expanduser()
    if config.model in BUNDLED_MODELS and name != config.model and not path.exists():
        raise ValueError(f"base_model must be {config.model!r}, the bundled model of the run; got {name!r}")
    if path.is_file():
        raise ValueError(f"base_model must be a Hub id, or a folder in diffusers' layout; got the file {name!r}")
    is_on_hub = name not in BUNDLED_MODELS and not path.exists()
    for source in dict.fromkeys((name, config.model)):
        if (place := configurations(source)) is not None:
            break
    else:
        raise ValueError(
            f"base_model {name!r} must have its configurations on this machine, which say how its pipeline is called. "
            f"Without its weights they are small: {download_of_configurations(name)}"
        )
    model: DiffusionModel | None = outline_model(place, *config.run.size)
    if not isinstance(model, PipelineModel):
        raise ValueError(f"base_model must be a pipeline that can be called without its weights; got {name!r}")
    return BaseModel(name, is_on_hub, model)


def configurations(source: str) -> str | None:
    """Return what `outline_model` takes for a model that is on this machine; `None` for another one."""
    if source in BUNDLED_MODELS or Path(source).expanduser().exists():
        return source
    try:
        folder = Path(snapshot_download(source, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return str(folder) if (folder / "model_index.json").is_file() else None
