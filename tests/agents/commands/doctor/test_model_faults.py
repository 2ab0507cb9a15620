"""Faults planted in a model: the doctor names each of them, and finds none in the healthy one."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler
from helpers.micro_families import micro_family
from helpers.micro_pipeline import micro_pipeline
from helpers.patients import Patient, examination_of, finding_of, findings_of
from safetensors.torch import load_file, save_file

from agents.commands.doctor.checks import CHECKS
from agents.commands.doctor.examination import examine

LORA = "pytorch_lora_weights.safetensors"


def test_healthy_model_is_green_in_every_check(tmp_path):
    findings = findings_of(Patient(), tmp_path)
    assert {name: finding.meaning for name, finding in findings.items() if finding.level != "green"} == {}
    assert len(findings) == 21
    assert findings["parity"].numbers["relative_difference"] < 1e-6
    assert findings["LoRA"].numbers["effect_of_the_lora"] > 1e-3


@pytest.mark.parametrize("family", ["stable_diffusion_2", "stable_diffusion_xl", "stable_diffusion_3.5"])
def test_families_agree_with_their_pipelines(family, tmp_path):
    findings = findings_of(micro_family(family), tmp_path, "sampler table", "denoiser", "decoder", "parity", "LoRA")
    assert {finding.level for finding in findings.values()} == {"green"}
    assert findings["parity"].numbers["relative_difference"] < 1e-5


@pytest.mark.parametrize(
    ("scheduler", "spacing"),
    [(PNDMScheduler, "leading"), (EulerDiscreteScheduler, "linspace"), (DPMSolverMultistepScheduler, "leading")],
)
def test_schedulers_that_never_clip_and_never_name_it(scheduler, spacing, tmp_path):
    pipeline = micro_pipeline()
    options = {name: pipeline.scheduler.config[name] for name in ("beta_start", "beta_end", "beta_schedule")}
    pipeline.scheduler = scheduler(**options, timestep_spacing=spacing, steps_offset=1)
    assert "clip_sample" not in pipeline.scheduler.config
    with torch.no_grad():
        pipeline.unet.conv_out.weight *= 10  # predicted clean latents far outside of [-1, 1]
    names = ("sampler table", "denoiser", "decoder", "parity", "LoRA")
    findings = findings_of(pipeline, tmp_path, *names, min_std=0.02)
    assert {name: one.meaning for name, one in findings.items() if one.level != "green"} == {}


def test_sampler_whose_images_score_unlike_those_of_the_deployed_one(tmp_path):
    class Faulty(Patient):
        def predict(self, denoiser, latents, timestep, conditioning):
            return super().predict(denoiser, latents, timestep, conditioning) - 2.0

    finding = finding_of(Faulty(), tmp_path, "stochastic sampler")
    assert finding.level == "amber"
    assert finding.numbers["gap"] != 0
    assert "other images than you deploy" in finding.advice


def test_pipeline_that_takes_no_latents_is_compared_from_its_own_noise(tmp_path):
    settings = {"guidance_scale": 1.0, "min_std": 0.02}
    findings = findings_of(micro_family("ddpm"), tmp_path, "denoiser", "parity", "LoRA", **settings)
    assert {finding.level for finding in findings.values()} == {"green"}
    assert findings["parity"].numbers["relative_difference"] < 1e-5


def test_wrong_timestep_scale(tmp_path):
    class Faulty(Patient):
        def predict(self, denoiser, latents, timestep, conditioning):
            return super().predict(denoiser, latents, timestep / 1000, conditioning)

    findings = findings_of(Faulty(), tmp_path, "sampler table", "denoiser", "parity")
    assert findings["sampler table"].level == "green"
    assert findings["denoiser"].level == findings["parity"].level == "red"
    assert "predict" in findings["denoiser"].advice


def test_wrong_guidance(tmp_path):
    class Faulty(Patient):
        def guide(self, negative, positive, scale):
            return super().guide(negative, positive, scale - 1)

    finding = finding_of(Faulty(), tmp_path, "denoiser", guidance_scale=4.0)
    assert finding.level != "green"
    assert "guidance 4" in finding.meaning


def test_wrong_negative_prompt(tmp_path):
    class Faulty(Patient):
        def negative_conditioning(self):
            return self.encode_prompts(["a cat"])

    assert finding_of(Faulty(), tmp_path, "denoiser", guidance_scale=4.0).level != "green"


def test_latents_in_less_than_the_runs_dtype(tmp_path):
    class Faulty(Patient):
        def predict(self, denoiser, latents, timestep, conditioning):
            return super().predict(denoiser, latents.bfloat16().float(), timestep, conditioning)

    assert finding_of(Faulty(), tmp_path, "denoiser").level != "green"


def test_prompts_that_are_ignored(tmp_path):
    class Faulty(Patient):
        def encode_prompts(self, prompts):
            return super().encode_prompts(["a cat"] * len(prompts))

    findings = findings_of(Faulty(), tmp_path, "prompts", "denoiser")
    assert findings["prompts"].level == "red"
    assert "same conditioning" in findings["prompts"].meaning


def test_denoiser_that_is_not_given_the_prompt(tmp_path):
    class Faulty(Patient):
        def predict(self, denoiser, latents, timestep, conditioning):
            empty = {name: torch.zeros_like(value) for name, value in conditioning.items()}
            return super().predict(denoiser, latents, timestep, empty)

    finding = finding_of(Faulty(), tmp_path, "prompts")
    assert finding.level == "red"
    assert "ignores the prompt" in finding.meaning


def test_table_of_another_scheduler(tmp_path):
    faulty = Patient()
    faulty.scheduler = DDIMScheduler.from_config(faulty.scheduler.config, beta_schedule="linear")
    finding = finding_of(faulty, tmp_path, "sampler table")
    assert finding.level == "red"
    assert "differs from DDIM's" in finding.meaning
    faulty.scheduler = DDIMScheduler.from_config(faulty.pipeline.scheduler.config, timestep_spacing="trailing")
    finding = finding_of(faulty, tmp_path, "sampler table")
    assert finding.level == "red"
    assert "timesteps begin" in finding.meaning


def test_table_with_less_noise_than_the_schedulers(tmp_path):
    examination = examination_of(Patient(), tmp_path)
    examination.policy.sampler = replace(examination.policy.sampler, std=0.9 * examination.policy.sampler.std)
    (finding,) = examine(examination, {"sampler table": CHECKS["sampler table"]})
    assert finding.level == "red"


def test_wrongly_scaled_decoder(tmp_path):
    class Faulty(Patient):
        def decode(self, latents):
            return super().decode(2 * latents)

    findings = findings_of(Faulty(), tmp_path, "decoder", "parity")
    assert findings["decoder"].level == "red"
    assert findings["parity"].level == "green"


def test_vae_that_overflows_in_half_precision(tmp_path):
    pipeline = micro_pipeline()
    with torch.no_grad():
        pipeline.vae.decoder.conv_in.weight *= 1e7  # normalized away in float32
    assert finding_of(pipeline, tmp_path, "decoder").level == "green"
    finding = finding_of(pipeline.to(dtype=torch.float16), tmp_path, "decoder", dtype="float16")
    assert finding.level == "red"
    assert "NaN" in finding.meaning
    assert finding.settings == {"dtype": "float32"}


def test_weights_that_are_not_finite(tmp_path):
    faulty = Patient()
    with torch.no_grad():
        faulty.denoiser.conv_in.bias[0] = torch.inf
    finding = finding_of(faulty, tmp_path, "model")
    assert finding.level == "red"
    assert "conv_in.bias" in finding.meaning


def test_decoder_that_hides_nan(tmp_path):
    class Faulty(Patient):
        def decode(self, latents):
            return super().decode(latents.nan_to_num())

    finding = finding_of(Faulty(), tmp_path, "failing sample")
    assert finding.level == "amber"
    assert "looks whole" in finding.meaning


def test_samples_that_are_not_finite(tmp_path):
    class Faulty(Patient):
        def predict(self, denoiser, latents, timestep, conditioning):
            return super().predict(denoiser, latents, timestep, conditioning) * torch.nan

    finding = finding_of(Faulty(), tmp_path, "stochastic sampler")
    assert finding.level == "red"
    assert "4 of 4 samples are NaN" in finding.meaning


def test_pipeline_whose_own_images_are_not_finite(tmp_path):
    class Faulty(Patient):
        def decode(self, latents):
            return torch.zeros(len(latents), 32, 32, 3, dtype=torch.uint8)

    faulty = Faulty()
    with torch.no_grad():
        faulty.pipeline.vae.decoder.conv_out.bias.fill_(torch.nan)
    findings = findings_of(faulty, tmp_path, "decoder", "stochastic sampler")
    assert {one.level for one in findings.values()} == {"red"}
    assert "2 of 2 images of the pipeline's own call are NaN" in findings["decoder"].meaning
    assert "4 of 4 images of the pipeline's own call are NaN" in findings["stochastic sampler"].meaning


def zeroed(weights):
    return {name: torch.zeros_like(value) for name, value in weights.items()}


def renamed(weights):
    return {name.replace("unet.", "unet.other."): value for name, value in weights.items()}


def doubled(weights):
    return {name: 2 * value if "lora_B" in name else value for name, value in weights.items()}


def halved(weights):
    return dict(list(weights.items())[: len(weights) // 2])


@pytest.mark.parametrize("fault", [zeroed, renamed, doubled, halved])
def test_lora_that_is_saved_wrongly(fault, tmp_path):
    class Faulty(Patient):
        def save_lora(self, denoiser, folder):
            super().save_lora(denoiser, folder)
            save_file(fault(load_file(folder / LORA)), folder / LORA, metadata={"format": "pt"})

    finding = finding_of(Faulty(), tmp_path, "LoRA")
    assert finding.level == "red"
    assert "LoRA" in finding.meaning or "raised" in finding.meaning


def test_examination_leaves_the_model_as_it_was(tmp_path):
    patient = Patient()
    parts = patient.pipeline.components
    before = {name: value.clone() for name, value in patient.denoiser.state_dict().items()}
    examination = examination_of(patient, tmp_path)
    learning = {name: value.clone() for name, value in examination.policy.state_dict().items()}
    examine(examination, {name: CHECKS[name] for name in ("denoiser", "gradient", "ratio", "update", "LoRA")})
    assert all(torch.equal(learning[name], value) for name, value in examination.policy.state_dict().items())
    assert patient.pipeline.components == parts
    assert patient.pipeline.scheduler is patient.scheduler
    after = patient.denoiser.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_model_that_does_not_load_is_red_and_the_machine_is_still_examined(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr("agents.commands.doctor.examination.load_configured_model", partial(fail))
    findings = findings_of(Patient(), tmp_path, "machine", "model", "parity", "plan")
    assert findings["machine"].level == "green"
    assert findings["model"].level == "red"
    assert "OSError: the disk is gone" in findings["model"].meaning
    assert findings["parity"].level == findings["plan"].level == "amber"
    assert "Not examined: the model failed: the disk is gone" in findings["plan"].meaning
