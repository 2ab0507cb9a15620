"""`ddpo-evaluate`: the images of `ddpo-sample`, scores that the CSV file reproduces, and errors before generation."""

import csv
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from helpers.scripts import run_script
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

from agents.evaluation import compare as command
from agents.evaluation.compare import EvaluateArguments, evaluate_models, prompt_sets
from agents.evaluation.comparison import Result, ScoredImage, best_strengths, compare
from agents.evaluation.comparison_report import comparison_grid
from agents.evaluation.generation import GenerationArguments, stock_images
from agents.evaluation.image_grid import image_grid
from agents.evaluation.sample import SampleArguments, generate, generate_films, write_grid
from ddpo_env.prompts import load_prompts

PROMPTS = ("a cat", "a fox", "two dogs")


@pytest.fixture(scope="module")
def lora(micro_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of one layer, which changes the images."""
    weights = load_file(micro_pipeline_folder / "unet" / "diffusion_pytorch_model.safetensors")
    name, weight = next((name, value) for name, value in weights.items() if name.endswith("attn1.to_q.weight"))
    layer = f"unet.{name.removesuffix('.weight')}".replace("to_q", "to_v")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{layer}.lora_A.weight": torch.randn(2, weight.shape[1], generator=generator),
        f"{layer}.lora_B.weight": 4 * torch.randn(weight.shape[0], 2, generator=generator),
    }
    folder = tmp_path_factory.mktemp("lora")
    save_file(tensors, folder / "pytorch_lora_weights.safetensors")
    return folder


def settings(model: Path, lora: Path | None) -> dict[str, Any]:
    return {"model": str(model), "lora": lora, "num_inference_steps": 2, "device": "cpu"}


def test_strengths_0_and_1_are_the_base_and_the_tuned_images_of_ddpo_sample(
    micro_pipeline_folder: Path, lora: Path
) -> None:
    own = settings(micro_pipeline_folder, lora)
    (base, tuned), _ = generate(SampleArguments(**own, prompts=PROMPTS, seeds=(3,), compare=True))
    with stock_images(GenerationArguments(**own)) as images:
        strengths = (0.0, 1.0, 0.5, 0.0, 1.0)
        found = [images(PROMPTS, [3, 1003, 2003], strength) for strength in strengths]
    for index, expected in ((0, base), (1, tuned), (3, base), (4, tuned)):
        np.testing.assert_array_equal(found[index], expected)
    assert not np.array_equal(base, tuned)
    assert not any(np.array_equal(found[2], one) for one in (base, tuned))


def test_film_ends_with_the_images_and_shows_the_decoded_latents_before(
    micro_pipeline_folder: Path, lora: Path, tmp_path: Path
) -> None:
    own = {**settings(micro_pipeline_folder, lora), "num_inference_steps": 3}
    film, output = tmp_path / "film.gif", tmp_path / "grid.png"
    arguments = SampleArguments(**own, prompts=PROMPTS, seeds=(3,), compare=True, film=film, output=output)
    films, labels = generate_films(arguments)
    images, expected_labels = generate(arguments)
    assert labels == expected_labels == ["base\nseed 3", "trained\nseed 3"]
    for steps, last in zip(films, images, strict=True):
        assert steps.shape == (3, *last.shape)
        np.testing.assert_array_equal(steps[-1], last)
    pipe = StableDiffusionPipeline.from_pretrained(micro_pipeline_folder)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    latents: list[Any] = []

    def keep(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents.append(tensors["latents"])
        return {}

    options = {"num_inference_steps": 3, "guidance_scale": 1.0, "eta": 1.0, "callback_on_step_end": keep}
    pipe(PROMPTS[0], generator=torch.Generator().manual_seed(3), **options)
    decoded = pipe.vae.decode(latents[1] / pipe.vae.config.scaling_factor).sample.detach()
    pixels = pipe.image_processor.postprocess(decoded, "np")[0] * 255
    assert np.abs(films[0][1][0].astype(int) - pixels.round()).max() <= 1
    write_grid(arguments)
    with Image.open(film) as frames, Image.open(output) as grid:
        assert (frames.n_frames, frames.size) == (3, grid.size)
        durations = []
        for index in range(frames.n_frames):
            frames.seek(index)
            durations.append(frames.info["duration"])
        assert durations == [150, 150, 2000]
        difference = np.abs(np.asarray(frames.convert("RGB")).astype(int) - np.asarray(grid))
    assert difference.mean() < 10  # a GIF has few colours, and these images are noise


def test_prompts_of_ddpo_sample_may_be_sets_and_files(
    micro_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("two.txt").write_text("# comment\na fox\ntwo dogs\n")
    own = settings(micro_pipeline_folder, None) | {"seeds": (3,), "num_inference_steps": 1}
    given = SampleArguments(**own, prompts=("a cat", "two.txt"))
    assert given.prompt_set.prompts == PROMPTS
    assert SampleArguments(prompts=("counting",)).prompt_set[0] == load_prompts("counting")[0]  # type: ignore[index]
    assert SampleArguments(prompts=("counting dogs",)).prompt_set.prompts == ("counting dogs",)
    (expected,), _ = generate(SampleArguments(**own, prompts=PROMPTS))
    np.testing.assert_array_equal(generate(given)[0][0], expected)
    write_grid(given)
    with Image.open("samples.png") as grid:
        assert grid.width > 3 * 112


def test_strength_multiplies_the_change_of_the_weights(micro_pipeline_folder: Path, lora: Path) -> None:
    with stock_images(GenerationArguments(**settings(micro_pipeline_folder, lora))) as images:
        found = images(["a cat"], [7], 0.5)
    pipe = StableDiffusionPipeline.from_pretrained(micro_pipeline_folder)
    tensors = load_file(lora / "pytorch_lora_weights.safetensors")
    down, up = (tensors[next(name for name in tensors if part in name)] for part in ("lora_A", "lora_B"))
    layer = next(iter(tensors)).removeprefix("unet.").rpartition(".lora_")[0]
    pipe.unet.get_submodule(layer).weight.data += 0.5 * up @ down
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "eta": 1.0, "output_type": "np"}
    image = pipe("a cat", generator=torch.Generator().manual_seed(7), **options).images[0]
    assert np.abs(found[0].astype(int) - (image * 255).round()).max() <= 1


def test_lora_without_a_text_encoder_is_loaded_without_a_warning(micro_pipeline_folder: Path, lora: Path) -> None:
    shown: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: shown.append(record.getMessage())  # type: ignore[method-assign]
    diffusers_logging.add_handler(handler)
    try:
        StableDiffusionPipeline.from_pretrained(micro_pipeline_folder).load_lora_weights(lora)
        assert "No LoRA keys associated to CLIPTextModel" in shown.pop()  # what diffusers says
        shown.clear()
        with stock_images(GenerationArguments(**settings(micro_pipeline_folder, lora))):
            assert shown == []
    finally:
        diffusers_logging.remove_handler(handler)


def right_colour(images: NDArray[np.uint8], prompts: list[str], metadata: Any) -> Any:
    """A judge that answers 0 or 1, and says what it reads."""
    right = images.mean(axis=(1, 2, 3)) > images[..., 0].mean(axis=(1, 2))
    return right.astype(float), {"word": ["blue" if one else "red" for one in right], "level": right.tolist()}


@pytest.fixture
def evaluation(
    micro_pipeline_folder: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> EvaluateArguments:
    (tmp_path / "some.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "single.txt").write_text("a cat")
    monkeypatch.chdir(tmp_path)
    found = command.configured_reward
    monkeypatch.setattr(
        command, "configured_reward", lambda name, *given: right_colour if name == "judge" else found(name, *given)
    )
    return EvaluateArguments(
        **settings(micro_pipeline_folder, lora),
        rewards=("jpeg_compressibility", "judge"),
        prompts=("some.txt", "single.txt"),
        samples_per_prompt=3,
        seed=5,
        strengths=(0.5, 1.0),
        batch_size=2,
        output=tmp_path / "results",
    )


def test_table_and_files_follow_from_the_scores_of_every_image(evaluation: EvaluateArguments) -> None:
    written = evaluate_models(evaluation)
    report = json.loads((evaluation.output / "evaluation.json").read_text())
    with (evaluation.output / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * (3 + 1) * 3
    assert {int(row["seed"]) - 1000 * int(row["prompt_index"]) for row in rows} == {5, 6, 7}
    assert {row["judge.word"] for row in rows} <= {"blue", "red"}
    assert len(report["results"]) == 2 * 2 * 3
    for result in report["results"]:
        reward, name, strength = result["reward"], result["prompt_set"], result["strength"]
        own = {
            (row["prompt"], row["seed"]): float(row[reward])
            for row in rows
            if row["prompt_set"] == name and float(row["strength"]) == strength
        }
        base = {
            (row["prompt"], row["seed"]): float(row[reward])
            for row in rows
            if row["prompt_set"] == name and float(row["strength"]) == 0
        }
        assert result["images"] == len(own) == 3 * result["prompts"]
        assert result["score"]["mean"] == pytest.approx(np.mean(list(own.values())))
        assert result["is_share"] == (reward == "judge")
        if strength == 0:
            assert result["change"] is None
            continue
        differences = [own[key] - base[key] for key in own]
        assert result["change"]["mean"] == pytest.approx(np.mean(differences), abs=1e-12)
        low, high = result["change"]["interval"]
        assert low - 1e-12 <= result["change"]["mean"] <= high + 1e-12
    assert f"{report['results'][0]['score']['mean']:.4g} [" in written
    assert written == (evaluation.output / "evaluation.md").read_text()
    assert {path.name for path in evaluation.output.iterdir()} == {
        *("evaluation.json", "evaluation.md", "scores.csv", "rewards.png", "some.png", "single.png")
    }
    width, height = Image.open(evaluation.output / "some.png").size
    assert width > 3 * 112
    assert height > 3 * 112
    with pytest.raises(ValueError, match="output must be a folder that does not exist yet"):
        evaluate_models(evaluation)


def image(name: str, index: int, sample: int, strength: float, score: float) -> ScoredImage:
    return ScoredImage(name, index, f"prompt {index}", sample, sample, strength, {"r": score}, {})


def test_prompts_and_not_samples_are_the_independent_units() -> None:
    """Equal samples of a prompt make no interval narrower."""
    values = [1.2, 2.9, 4.1, 7.3]
    few, many = (
        compare(
            [image("set", p, k, s, v + s) for s in (0.0, 1.0) for p, v in enumerate(values) for k in range(samples)]
        )
        for samples in (1, 20)
    )
    assert few[0].score.interval == pytest.approx(many[0].score.interval)
    assert few[0].score.mean == pytest.approx(many[0].score.mean)
    assert [one.change.mean for one in (few[1], many[1]) if one.change] == pytest.approx([1, 1])
    assert many[1].images == 80


def test_prompt_that_occurs_again_counts_once(tmp_path: Path) -> None:
    lines = ["a cat", "a cat", {"prompt": "a cat", "colour": "red"}, "a dog", {"prompt": "a cat", "colour": "red"}]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = prompt_sets((str(tmp_path / "set.jsonl"),))["set"]
    assert [(text, bool(metadata)) for text, metadata in found] == [("a cat", False), ("a cat", True), ("a dog", False)]


def test_best_strength_is_the_one_with_the_highest_mean() -> None:
    scores = {0.0: 1.0, 0.5: 3.0, 1.0: 2.0}
    results: list[Result] = compare([image("a", p, 0, s, v + p) for s, v in scores.items() for p in range(2)])
    assert best_strengths(results) == {"r": {"a": 0.5}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rewards", "no_such_reward"], " rewards must be one of jpeg_compressibility"),
        (["--rewards", "temporal_consistency"], "rewards must take images; got 'temporal_consistency'"),
        (["--rewards", "jpeg_compressibility:1,clip_score:1"], "rewards must score each image by itself"),
        (["--rewards", "jpeg_compressibility", "jpeg_compressibility"], "rewards must name each one once"),
        (["--reward-options", "clip_score.model=tiny"], "reward_options must begin with one of the rewards"),
        (["--reward-options", "jpeg_compressibility.a=1"], "takes no options (reward_options)"),
        (["--pipeline-arguments", "a"], "pipeline_arguments must be key=value pairs; got 'a'"),
        (["--reward-options", "model=tiny"], "reward_options must begin with one of the rewards"),
        (["--prompts", "no_such_set"], "prompts must be one of simple_animals"),
        (["--prompts", "empty.txt"], "must hold at least one prompt"),
        (["--prompts", "some.txt", "folder/some.txt"], "prompts must have names of their own, 'some' is taken"),
        (["--strengths", "0"], "strengths[0] must be in (0, 10]; got 0"),
        (["--strengths", "1", "1"], "strengths must name each one once"),
        (["--rewards", "vlm_vqa", "--reward-options", "vlm_vqa.model=tiny"], "vlm_vqa needs metadata with questions"),
        (["--lora", "none"], "lora must be a .safetensors file, or a folder with"),
        (["--lora", "other"], "was trained for another model than"),
        (["--samples-per-prompt", "0"], "samples_per_prompt must be in [1, 1000]"),
        (["--output", "folder"], "output must be a folder that does not exist yet; got 'folder'"),
    ],
)
def test_wrong_arguments_are_one_line_before_a_model_is_loaded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    micro_pipeline_folder: Path,
    arguments: list[str],
    message: str,
) -> None:
    from ddpo_env.models import loading

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loading, "load_pipeline", load)
    monkeypatch.setattr(loading, "_loaded", {})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "empty.txt").touch()
    for file in ("some.txt", "folder/some.txt"):
        (tmp_path / file).write_text("a cat")
    save_file({"unet.no.lora_A.weight": torch.zeros(2, 4)}, tmp_path / "other" / "pytorch_lora_weights.safetensors")
    defaults = {"--rewards": "jpeg_compressibility", "--prompts": "some.txt", "--model": str(micro_pipeline_folder)}
    given = [*arguments, *(one for pair in defaults.items() if pair[0] not in arguments for one in pair)]
    assert run_script("evaluate", given, monkeypatch) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err + shown.out
    assert not (tmp_path / "evaluation").exists()


REWARDS_THAT_FAIL = """
def boom(images, prompts, metadata):
    return {}["foo"]

def nan(images, prompts, metadata):
    return [float("nan")] * len(images)
"""


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("boom", "error: KeyError: 'foo' (raised by the reward boom, asked about 2 samples)\n"),
        ("nan", "error: reward nan must be finite; got nan for prompt 'a cat'"),
    ],
)
def test_reward_that_fails_is_one_line_and_leaves_its_traceback(
    micro_pipeline_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    reward: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "failing_rewards.py").write_text(REWARDS_THAT_FAIL)
    (tmp_path / "two.txt").write_text("a cat\na dog\n")
    given = ["--rewards", f"failing_rewards:{reward}", "--prompts", "two.txt", "--model", micro_pipeline_folder]
    given += ["--num-inference-steps", "1", "--samples-per-prompt", "1", "--device", "cpu"]
    assert run_script("evaluate", given, monkeypatch) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
    assert "the option non_finite_rewards" not in shown
    assert "Traceback" in (tmp_path / "evaluation" / "error.txt").read_text()
    assert run_script("evaluate", given, monkeypatch) == 2
    assert "'evaluation', which holds an evaluation that did not finish and may be deleted" in capsys.readouterr().err


def test_grid_cuts_long_texts_and_no_others() -> None:
    images = np.zeros((2, 16, 16, 3), np.uint8)
    long, many_lines = "a very red cat " * 300, "red\n" * 300

    def grid(text: str) -> Image.Image:
        return comparison_grid({0.0: images, 1.0: images}, ["a cat", text], {0.0: ["", text], 1.0: ["a dog", ""]})

    short = grid("a cat that sits on the shore of a lake")
    assert short.size != grid("a cat").size
    for text in (long, many_lines, "x" * 4500):
        assert grid(text).width == short.width
        assert grid(text).height <= short.height + 200
        assert image_grid([images], [""], ["a cat", text]).height < 300
    np.testing.assert_array_equal(image_grid([images], [""], ["a", long]), image_grid([images], [""], ["a", long * 2]))


def test_images_that_are_not_finite_are_an_error(tmp_path):
    """Stock diffusers' first DDIM step has the root of a negative number with this model, eta 1 and 3 steps."""
    arguments = SampleArguments(model="tiny", prompts=("a fox",), num_inference_steps=3, device="cpu")
    with stock_images(arguments) as images, pytest.raises(ValueError, match=r"not finite with num_inference_steps=3"):
        images(["a fox"], [0], 1.0)
    with stock_images(replace(arguments, eta=0.999)) as images:
        assert images(["a fox"], [0], 1.0).std() > 10
