"""A healthy micro model under the doctor's examination; tests override one member to plant a fault."""

from itertools import count

from agents.commands.doctor.checks import CHECKS
from agents.commands.doctor.examination import Examination, examine
from agents.distributed import Processes
from agents.training.preparation import check_run
from ddpo_env.models import ModelAbilities, load_model
from helpers.micro_agents import micro_config
from helpers.micro_pipeline import micro_pipeline

_numbers = count()


class Patient(ModelAbilities):
    """The micro Stable Diffusion, whose members pass on to the healthy model."""

    def __init__(self):
        self.healthy = load_model(micro_pipeline(), "cpu")
        self.source = f"patient-{next(_numbers)}"
        self.pipeline, self.scheduler, self.denoiser = (
            getattr(self.healthy, name) for name in ("pipeline", "scheduler", "denoiser")
        )
        self.latent_shape, self.conditioning_shapes = self.healthy.latent_shape, self.healthy.conditioning_shapes

    def encode_prompts(self, prompts):
        return self.healthy.encode_prompts(prompts)

    def decode(self, latents):
        return self.healthy.decode(latents)

    def decode_with_gradient(self, latents):
        return self.healthy.decode_with_gradient(latents)

    def predict(self, denoiser, latents, timestep, conditioning):
        return self.healthy.predict(denoiser, latents, timestep, conditioning)

    def save_lora(self, denoiser, folder):
        self.healthy.save_lora(denoiser, folder)


def examination_of(model, folder, reward=None, **settings):
    """An examination of a micro run of a model, with another reward if one is given."""
    model = load_model(model)
    config = micro_config(model.source, folder / "run", **{"learning_rate": 1e-3} | settings)
    checked = check_run(config, Processes())
    if reward is not None:
        checked = type(checked)(checked.config, checked.folder, reward, checked.prompts)
    examination = Examination(checked, folder)
    examination.kept = model  # a model of one's own is found as long as somebody holds it
    return examination


def findings_of(model, folder, *names, reward=None, **settings):
    """Findings of some checks, or of all, by name."""
    checks = {name: CHECKS[name] for name in names} if names else CHECKS
    examination = examination_of(model, folder, reward, **settings)
    try:
        return {finding.name: finding for finding in examine(examination, checks)}
    finally:
        examination.close()


def finding_of(model, folder, name, **arguments):
    """The finding of one check."""
    return findings_of(model, folder, name, **arguments)[name]
