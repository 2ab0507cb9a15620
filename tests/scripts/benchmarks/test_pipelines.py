"""The checks that every pipeline goes through."""

import datetime
import subprocess
import sys

import pytest
import torch
from helpers.micro_pipeline import micro_pipeline
from helpers.paths import ROOT, SCRIPTS

from ddpo_env.models.families.batching import find_batching, in_batches

INPUTS = {"prompt": "a cat", "num_inference_steps": 2, "guidance_scale": 5.0, "output_type": "np"}
FOLDER = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import diffusers
from helpers.micro_pipeline import micro_pipeline


class Config:
    pipeline_class = diffusers.StableDiffusionPipeline

    def get_dummy_inputs(self, device, seed=0):
        return {inputs!r}


class StableDiffusionTests(Config):
    pipeline_class = diffusers.StableDiffusionPipeline

    def get_dummy_components(self):
        return micro_pipeline().components


class CrashTests(Config):
    pipeline_class = diffusers.StableDiffusionXLPipeline

    def get_dummy_components(self):
        import os
        os._exit(1)


class HangTests(Config):
    pipeline_class = diffusers.FluxPipeline

    def get_dummy_components(self):
        import time
        time.sleep(1000)
"""


def test_a_pipeline_passes_with_and_without_guidance():
    from tiny_pipelines.checks import check_pipeline

    found = check_pipeline(micro_pipeline(), INPUTS)
    assert not found.failed, found.trace
    assert found.figures["unguided"] < 1e-5
    assert found.figures["guided"] < 1e-5
    assert found.figures["sampler"] == "DDIMScheduler"


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (lambda latents, timestep: latents * timestep.reshape(-1, *[1] * (latents.ndim - 1)), "any"),
        (lambda latents, timestep: latents * float(timestep), "timestep"),
        (lambda latents, timestep: latents * timestep[..., None].flatten()[0], "timestep"),
        (lambda latents, timestep: latents + latents.mean(0), "row"),
    ],
)
def test_rows_of_a_call_are_found(output, expected):
    generator = torch.Generator().manual_seed(0)
    latents, timestep = torch.randn(3, 4, 2, generator=generator), torch.tensor([9.0, 4.0, 9.0])

    def call(latents, timestep, conditioning):
        return output(latents, timestep) + conditioning["prompt_embeds"]

    conditioning = {"prompt_embeds": torch.randn(3, 4, 2, generator=generator)}
    first = {"prompt_embeds": conditioning["prompt_embeds"][:1]}
    batching = find_batching(call, latents[:1], timestep[0], first)
    assert batching == expected
    alone = [
        call(latents[[row]], timestep[row], {"prompt_embeds": conditioning["prompt_embeds"][[row]]}) for row in range(3)
    ]
    torch.testing.assert_close(in_batches(call, batching, latents, timestep, conditioning), torch.cat(alone))


def test_another_result_of_the_pipeline_is_found(monkeypatch):
    from tiny_pipelines.checks import check_pipeline

    pipeline = micro_pipeline()
    step = type(pipeline.scheduler).step
    steps = iter(range(10**6))

    def drifting(self, output, *arguments, **options):
        moved = step(self, output, *arguments, **options)
        return (moved[0] + 0.01 * next(steps), *moved[1:])

    monkeypatch.setattr(type(pipeline.scheduler), "step", drifting)
    found = check_pipeline(pipeline, INPUTS)
    assert found.failed == "unguided"
    assert "max difference" in found.reason


@pytest.mark.slow
def test_a_crash_and_a_hang_are_rows(tmp_path):
    tests = tmp_path / "tests"
    (tests / "pipelines").mkdir(parents=True)
    source = FOLDER.format(root=str(ROOT), tests=str(ROOT / "tests"), inputs=INPUTS)
    (tests / "pipelines" / "test_micro.py").write_text(source)
    output = tmp_path / "pipelines.md"
    command = [sys.executable, str(SCRIPTS / "benchmarks" / "pipelines.py"), f"--tests={tests}", f"--output={output}"]
    subprocess.run([*command, "--seconds=20"], check=True, capture_output=True)
    text = output.read_text()
    assert text.count("✓") == 1
    assert "`FluxPipeline` (time: not finished after 20 s)" in text
    assert "`StableDiffusionXLPipeline` (process: the process ended)" in text


def test_reasons_are_grouped():
    from tiny_pipelines.document import document

    reason = "ValueError: model 'X' must be a pipeline with a scheduler and"
    refused = {"failed": "built", "reason": reason, "figures": {}}
    text = document({"XPipeline": refused, "YPipeline": refused}, ["ZPipeline"], datetime.date(2026, 1, 1))
    assert "0 of 3 pipelines" in text
    assert text.count("(2): `XPipeline`") == 1


def test_a_folder_without_pipelines_is_refused(tmp_path):
    from tiny_pipelines.suite import test_classes as found_in

    with pytest.raises(ValueError, match="folder tests of a checkout"):
        list(found_in(tmp_path))


def test_stand_in_tokenizers_stay_offline():
    from tiny_pipelines.hub import stand_in_tokenizer

    for name in ("tiny-random-t5", "tiny-random-clip", "Qwen2Tokenizer", "dummy-gemma", "tiny-random-BertModel"):
        short, long = (stand_in_tokenizer(name)(text).input_ids for text in ("a cat", "a red cat on the roof"))
        assert len(long) - len(short) == 4
        assert max(long) < 152064
    assert torch.tensor(stand_in_tokenizer("clip")("a cat").input_ids).argmax() == 3  # CLIP finds a text's end by this
