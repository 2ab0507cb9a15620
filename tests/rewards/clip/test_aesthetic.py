"""The aesthetic reward: the scores of the published head if its file is available, and the arithmetic."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.micro_pipeline import character_tokenizer
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from rewards import evaluate_reward, load_reward
from rewards.clip.aesthetic import Aesthetic, AestheticHead
from rewards.networks.pretrained import load_weights

LAYERS = ((0, 768, 1024), (2, 1024, 128), (4, 128, 64), (6, 64, 16), (7, 16, 1))
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])


def random_head(layers=LAYERS, seed=0):
    generator = np.random.default_rng(seed)
    weights = {}
    for number, inputs, outputs in layers:
        weights[f"layers.{number}.weight"] = generator.standard_normal((outputs, inputs)).astype("f4") / inputs**0.5
        weights[f"layers.{number}.bias"] = generator.standard_normal(outputs).astype("f4")
    return weights


def numpy_score(weights, embeddings, layers=LAYERS):
    scores = np.asarray(embeddings, np.float64)
    for number, _, _ in layers:
        scores = scores @ weights[f"layers.{number}.weight"].astype("f8").T + weights[f"layers.{number}.bias"]
    return scores[:, 0]


def tensors(weights):
    return {name: torch.tensor(value) for name, value in weights.items()}


def unit(embeddings):
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


def test_published_head_scores_as_published():
    file = os.environ.get("DDPO_ENV_AESTHETIC_HEAD", "")
    if not Path(file).is_file():
        pytest.skip("set DDPO_ENV_AESTHETIC_HEAD to the file sac+logos+ava1-l14-linearMSE.pth")
    head = AestheticHead(load_weights(file))
    raw = np.random.default_rng(0).standard_normal((4, 768)).astype("float32")
    np.testing.assert_allclose(
        head(torch.tensor(unit(raw))).numpy(), [4.464581, 5.480434, 5.008131, 5.676257], atol=1e-5
    )
    np.testing.assert_allclose(head(torch.tensor(raw)).numpy(), [-16.14, 11.83, -1.31, 17.15], atol=0.01)
    assert head.dimensions == 768


def test_head_is_a_chain_of_affine_maps_without_activations():
    weights = random_head()
    embeddings = unit(np.random.default_rng(1).standard_normal((6, 768)).astype("f4"))
    scores = AestheticHead(tensors(weights))(torch.tensor(embeddings))
    np.testing.assert_allclose(scores.numpy(), numpy_score(weights, embeddings), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("layers.2.bias"), r"must have layers\.N\.weight and layers\.N\.bias; got"),
        (lambda weights: weights.update({"mlp.0.weight": torch.zeros(1)}), r"must have layers\.N\.weight"),
        (lambda weights: weights.clear(), r"must have layers\.N\.weight .* got \[\]"),
        (lambda weights: weights.update({"layers.7.weight": torch.zeros(2, 16)}), "a chain of matrices"),
        (lambda weights: weights.update({"layers.4.weight": torch.zeros(64, 127)}), "a chain of matrices"),
        (lambda weights: weights.update({"layers.4.bias": torch.zeros(63)}), "a chain of matrices"),
    ],
)
def test_other_files_are_refused(change, message):
    weights = tensors(random_head())
    change(weights)
    with pytest.raises(ValueError, match=message):
        AestheticHead(weights)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "clip"
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**tower, "image_size": 16, "patch_size": 8}
    tokenizer = character_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**tower, "vocab_size": len(tokenizer), **ids, "pad_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    crop = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=crop).save_pretrained(folder)
    return folder


def test_reward_scores_the_normalised_embedding_of_the_image(clip_folder, tmp_path):
    layers = ((0, 8, 4), (2, 4, 1))
    weights = random_head(layers)
    torch.save(tensors(weights), tmp_path / "head.pth")
    images = np.random.default_rng(2).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    reward = load_reward("aesthetic", model=clip_folder, head=tmp_path / "head.pth", device="cpu")
    scores, _ = evaluate_reward(reward, images, ["a cat"] * 3, [{}] * 3)

    small = [np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BICUBIC)) for image in images]
    pixels = ((np.stack(small) / 255 - MEAN) / STD).transpose(0, 3, 1, 2)
    with torch.no_grad():
        model = CLIPModel.from_pretrained(clip_folder).eval()
        embeddings = model.get_image_features(torch.tensor(pixels).float()).pooler_output.numpy()
    np.testing.assert_allclose(scores, numpy_score(weights, unit(embeddings), layers), atol=1e-5)
    assert np.abs(scores - numpy_score(weights, embeddings, layers)).max() > 0.01, "un-normalised would differ"
    reward.unload()
    np.testing.assert_allclose(evaluate_reward(reward, images, ["a dog"] * 3, [{}] * 3)[0], scores)


def test_head_of_another_clip_is_named(clip_folder, tmp_path):
    torch.save(tensors(random_head()), tmp_path / "head.pth")
    reward = Aesthetic(clip_folder, tmp_path / "head.pth", device="cpu")
    with pytest.raises(ValueError, match=r"takes embeddings of 768 dimensions, but the CLIP model .* makes 8"):
        reward.load()
    with pytest.raises(ValueError, match=r"weights must be a file that exists, or 'owner/repository/file' on the Hub"):
        Aesthetic(clip_folder, "no-such-head.pth")
