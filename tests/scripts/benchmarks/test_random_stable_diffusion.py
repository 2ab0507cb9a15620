"""Random models for benchmarks: their sizes, and that they are written without ddpo-env."""

import os
import subprocess
import sys

import pytest
import torch
from helpers.paths import SCRIPTS


def test_the_random_model_is_read_by_both_and_has_the_size(monkeypatch, tmp_path):
    import random_stable_diffusion

    from ddpo_env import load_model

    monkeypatch.setattr(sys, "argv", ["random_stable_diffusion.py", str(tmp_path / "model")])
    assert random_stable_diffusion.main() == 0
    model = load_model(tmp_path / "model", "cpu")
    assert model.latent_shape == (4, 16, 16)
    assert sum(weight.numel() for weight in model.denoiser.parameters()) == 1_427_012
    assert model.conditioning_shapes == {"prompt_embeds": (77, 32)}


PUBLISHED = {  # of CompVis/stable-diffusion-v1-4 and stabilityai/stable-diffusion-xl-base-1.0
    "sd14": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
}


@pytest.mark.parametrize("architecture", PUBLISHED)
def test_published_architectures_have_the_published_numbers_of_weights(architecture):
    from ddpo_env.models.random_pipelines import build_pipeline

    pipeline = build_pipeline(architecture, "meta", torch.bfloat16)
    components = {name: getattr(pipeline, name) for name in PUBLISHED[architecture]}
    found = {name: sum(weight.numel() for weight in component.parameters()) for name, component in components.items()}
    assert found == PUBLISHED[architecture]
    assert {weight.dtype for component in components.values() for weight in component.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


def test_an_architecture_is_written_in_a_dtype(small_architecture, monkeypatch, capsys, tmp_path):
    import random_stable_diffusion
    from safetensors.torch import load_file

    arguments = ["x.py", str(tmp_path / "model"), "--architecture=sd14", "--dtype=bfloat16"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert random_stable_diffusion.main() == 0
    weights = load_file(tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert random_stable_diffusion.main() == 2
    assert "folder must be empty or not exist yet" in capsys.readouterr().err


def test_the_random_model_is_written_where_the_package_is_not(tmp_path):
    code = (
        "import sys; sys.modules.update({name: None for name in ('ddpo_env', 'agents', 'rewards', 'gymnasium')}); "
        f"sys.path.insert(0, {str(SCRIPTS / 'benchmarks')!r}); "
        "import random_stable_diffusion as r; from pathlib import Path; "
        f"r.write(Path({str(tmp_path / 'model')!r}))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model" / "model_index.json").is_file()
