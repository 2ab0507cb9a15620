"""CLIP rewards: a tiny random CLIP against preprocessing in Pillow and NumPy, and the published formulas."""

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.images import random_images
from helpers.micro_pipeline import TOKENS, character_tokenizer
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from rewards import evaluate_reward, load_reward
from rewards.clip.clip_score import ClipScore
from rewards.clip.open_clip import convert_open_clip
from rewards.clip.preference import HPSv2, PickScore
from rewards.networks import devices, pretrained

SIDE = 24
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])
PROMPTS = ["a cat", "a dog riding a bike", "an ant", "a cat", "fox"]


def tiny_config(**vision):
    tokenizer = character_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    tower = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 8,
    }
    return CLIPConfig(text_config=text, vision_config=tower | vision, projection_dim=12)


def save_clip(folder, seed=0):
    """A random CLIP with its tokenizer and image processor; weights large enough to tell images apart."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(tiny_config())
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("models") / "clip")


def resized_and_cropped(image):
    """OpenAI's preprocessing: resize the shortest side, bicubic, then crop the middle."""
    height, width = image.shape[:2]
    scale = SIDE / min(height, width)
    size = (SIDE, int(height * scale)) if width <= height else (int(width * scale), SIDE)
    resized = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC), np.float64)
    top, left = (resized.shape[0] - SIDE) // 2, (resized.shape[1] - SIDE) // 2
    return resized[top : top + SIDE, left : left + SIDE]


def letterboxed(image):
    """HPSv2's preprocessing: resize the longest side, bicubic, with black borders."""
    height, width = image.shape[:2]
    scale = SIDE / max(height, width)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    resized = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC), np.float64)
    square = np.zeros((SIDE, SIDE, 3))
    top, left = (SIDE - size[1]) // 2, (SIDE - size[0]) // 2
    square[top : top + size[1], left : left + size[0]] = resized
    return square


def reference_logits(folder, images, prompts, prepared=resized_and_cropped):
    """`logits_per_image` of each pair, and exp(logit_scale): the whole model, one pair at a time, without padding."""
    model = CLIPModel.from_pretrained(folder).eval()
    tokenizer = character_tokenizer()
    logits = []
    for image, prompt in zip(images, prompts, strict=True):
        pixels = ((prepared(image) / 255 - MEAN) / STD).transpose(2, 0, 1)[None]
        ids = tokenizer(prompt, truncation=True, max_length=TOKENS, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            output = model(input_ids=ids, pixel_values=torch.tensor(pixels, dtype=torch.float32))
        logits.append(float(output.logits_per_image))
    return np.array(logits), float(model.logit_scale.exp().detach())


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (1, 7), (SIDE, SIDE), (40, 40), (37, 91), (130, 50)])
@pytest.mark.parametrize("name", ["clip_score", "pickscore", "hps_v2"])
def test_score_is_the_formula_on_images_of_any_size(clip_folder, name, size):
    images = random_images(len(PROMPTS), 0, *size)
    prepared = letterboxed if name == "hps_v2" else resized_and_cropped
    logits, scale = reference_logits(clip_folder, images, PROMPTS, prepared)
    expected = {"clip_score": logits / 100, "pickscore": logits, "hps_v2": logits / scale}[name]
    own_weights = {"weights": None} if name == "hps_v2" else {}
    reward = load_reward(name, model=clip_folder, device="cpu", **own_weights)
    scores, details = evaluate_reward(reward, images, PROMPTS, [{}] * len(PROMPTS))
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
    assert len(set(scores.round(6))) == len(PROMPTS)
    assert details == {}


def test_score_does_not_depend_on_the_batch(clip_folder):
    images = random_images(5)
    together = ClipScore(clip_folder, device="cpu")(images, PROMPTS, [{}] * 5)
    in_twos = ClipScore(clip_folder, device="cpu", batch_size=2)(images, PROMPTS, [{}] * 5)
    reward = ClipScore(clip_folder, device="cpu")
    alone = [reward(images[index : index + 1], PROMPTS[index : index + 1], [{}])[0] for index in range(5)]
    np.testing.assert_allclose(in_twos, together, atol=1e-6)
    np.testing.assert_allclose(alone, together, atol=1e-6)
    assert reward(images[:0], [], []).shape == (0,)


def test_half_precision_is_close_and_scored_in_float32(clip_folder):
    images = random_images(5)
    exact = PickScore(clip_folder, device="cpu")(images, PROMPTS, [{}] * 5)
    reward = PickScore(clip_folder, device="cpu", dtype="bfloat16")
    rounded = reward(images, PROMPTS, [{}] * 5)
    assert reward.loaded.model.dtype == torch.bfloat16
    assert rounded.dtype == np.float32
    np.testing.assert_allclose(rounded, exact, atol=0.02 * reward.loaded.logit_scale)
    assert reward.loaded.embed_images([Image.fromarray(images[0])]).norm().item() == pytest.approx(1, abs=1e-5)


def test_long_prompts_are_cut_to_what_the_model_takes(clip_folder):
    images = random_images(1)
    long = "a cat and a dog and a fox and an ant on a bike"
    expected, _ = reference_logits(clip_folder, images, [long])
    np.testing.assert_allclose(PickScore(clip_folder, device="cpu")(images, [long], [{}]), expected, rtol=1e-5)


def test_rewards_share_a_model_until_the_last_one_releases_it(clip_folder):
    first, second = ClipScore(clip_folder, device="cpu"), PickScore(clip_folder, device="cpu")
    assert first._loaded is None, "nothing is loaded before it is used"
    first.load()
    assert second.loaded is first.loaded
    alive = weakref.ref(first.loaded)
    before = first(random_images(2), PROMPTS[:2], [{}] * 2)
    first.unload()
    assert alive() is not None
    second.unload()
    gc.collect()
    assert alive() is None
    np.testing.assert_array_equal(first(random_images(2), PROMPTS[:2], [{}] * 2), before)


def test_tokenizer_and_image_processor_may_be_another_models(clip_folder, tmp_path):
    CLIPModel.from_pretrained(clip_folder).save_pretrained(tmp_path / "bare")
    images = random_images(2)
    expected = PickScore(clip_folder, device="cpu")(images, PROMPTS[:2], [{}] * 2)
    bare = PickScore(tmp_path / "bare", clip_folder, device="cpu")
    np.testing.assert_array_equal(bare(images, PROMPTS[:2], [{}] * 2), expected)
    assert PickScore()._arguments[0] == "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model": "/no/such/folder"},
            "model must be 'tiny' for the bundled one, a folder that exists, or a Hub id .*; got '/no/such/folder'",
        ),
        ({"model": "clip"}, "model must be .* got 'clip'"),
        ({"model": Path("a/b")}, "model must be .* got 'a/b'"),
        ({"device": "gpu"}, "device must be auto or one of cpu.*; got 'gpu'"),
        ({"device": "cuda:99"}, "device must be auto or one of cpu.*; got 'cuda:99'"),
        ({"dtype": "float64"}, "dtype must be auto or one of float32, float16, bfloat16; got 'float64'"),
        ({"batch_size": 0}, "batch_size must be an integer in \\[1, 1000000\\]; got 0"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(options, message):
    with pytest.raises(ValueError, match=message):
        load_reward("clip_score", **options)


def test_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"contains no transformers model: it has no config\.json"):
        ClipScore(tmp_path)


def test_model_that_cannot_be_downloaded_is_named():
    with pytest.raises(OSError, match="cannot load 'nobody/no-such-clip'; without a network give a folder"):
        ClipScore("nobody/no-such-clip", device="cpu").load()
    with pytest.raises(OSError, match=r"cannot load 'nobody/nothing/head\.pth'; give a file if there is no network"):
        pretrained.load_weights("nobody/nothing/head.pth")


@pytest.mark.parametrize(
    ("reward", "setting"),
    [("aesthetic", "model=tiny"), ("clip_score", "model=tiny"), ("vlm_vqa", "model=tiny"), ("pickscore", None)],
)
def test_error_without_a_network_names_the_bundled_model_where_there_is_one(reward, setting, monkeypatch):
    def offline(*_):
        raise OSError("no network")

    monkeypatch.setattr(pretrained, "load_cached", offline)
    with pytest.raises(OSError, match=r"^cannot load .*; without a network give a folder") as error:
        load_reward(reward, device="cpu").load()
    hint = f" or the bundled model, with --reward-options {setting}; in a weighted sum TERM.{setting}:"
    assert (hint in str(error.value)) == (setting is not None)
    assert ("bundled" in str(error.value)) == (setting is not None)


def test_dtypes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 1)
    assert devices.resolve_dtype("auto", cpu) == torch.float32
    assert devices.resolve_dtype("auto", cuda) == torch.bfloat16
    assert devices.resolve_dtype(torch.float16, cpu) == torch.float16


class OpenClipBlock(torch.nn.Module):
    """A residual block with open_clip's names, written with PyTorch's own attention."""

    def __init__(self, width):
        super().__init__()
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.attn = torch.nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = torch.nn.ModuleDict(
            {"c_fc": torch.nn.Linear(width, 2 * width), "c_proj": torch.nn.Linear(2 * width, width)}
        )

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](torch.nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class OpenClipTower(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.resblocks = torch.nn.ModuleList(OpenClipBlock(width) for _ in range(2))


class OpenClip(torch.nn.Module):
    """open_clip's `CLIP` for the tiny configuration: names, attention and projections as there."""

    def __init__(self, vocabulary, width=16, projection=12):
        super().__init__()

        def random(*shape):
            return torch.nn.Parameter(torch.randn(*shape) * 0.3)

        self.logit_scale = torch.nn.Parameter(torch.tensor(2.5))
        self.positional_embedding = random(TOKENS, width)
        self.text_projection = random(width, projection)
        self.token_embedding = torch.nn.Embedding(vocabulary, width)
        self.transformer = OpenClipTower(width)
        self.ln_final = torch.nn.LayerNorm(width)
        self.visual = torch.nn.Module()
        self.visual.class_embedding = random(width)
        self.visual.positional_embedding = random((SIDE // 8) ** 2 + 1, width)
        self.visual.proj = random(width, projection)
        self.visual.conv1 = torch.nn.Conv2d(3, width, 8, 8, bias=False)
        self.visual.ln_pre, self.visual.ln_post = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.visual.transformer = OpenClipTower(width)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)

    def encode_image(self, pixels):
        x = self.visual.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.visual.class_embedding.expand(len(x), 1, -1), x], 1) + self.visual.positional_embedding
        x = self.visual.ln_pre(x)
        for block in self.visual.transformer.resblocks:
            x = block(x)
        return self.visual.ln_post(x[:, 0]) @ self.visual.proj

    def encode_text(self, ids):
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        mask = torch.full((ids.shape[1], ids.shape[1]), float("-inf")).triu(1)
        for block in self.transformer.resblocks:
            x = block(x, mask)
        return self.ln_final(x)[:, -1] @ self.text_projection


@pytest.fixture
def hps_files(tmp_path):
    """Architecture, tokenizer and image processor in one folder, and a checkpoint in open_clip's layout."""
    torch.manual_seed(1)
    original = OpenClip(len(character_tokenizer())).eval()
    folder = save_clip(tmp_path / "clip")
    config = tiny_config(hidden_act="gelu")
    config.text_config.hidden_act = "gelu"
    config.save_pretrained(folder)
    torch.save({"epoch": 3, "state_dict": original.state_dict()}, tmp_path / "hps.pt")
    return original, folder, tmp_path / "hps.pt"


def test_hps_v2_reads_weights_in_open_clips_layout(hps_files):
    original, folder, weights = hps_files
    images = random_images(3, height=50, width=30)
    scores = HPSv2(folder, weights, device="cpu")(images, PROMPTS[:3], [{}] * 3)
    expected = []
    with torch.no_grad():
        for image, prompt in zip(images, PROMPTS, strict=False):
            pixels = torch.tensor(((letterboxed(image) / 255 - MEAN) / STD).transpose(2, 0, 1)[None]).float()
            ids = character_tokenizer()(prompt, truncation=True, return_tensors="pt")["input_ids"]
            pair = original.encode_image(pixels), original.encode_text(ids)
            expected.append(torch.nn.functional.cosine_similarity(*pair).item())
    np.testing.assert_allclose(scores, expected, atol=2e-5)


def test_weights_that_do_not_fit_are_refused(hps_files, tmp_path):
    original, folder, _ = hps_files
    with pytest.raises(ValueError, match=r"weights must be in open_clip's layout; it has no text_model\.x\.weight"):
        convert_open_clip({"text_model.x.weight": torch.zeros(1)})
    weights = original.state_dict()
    weights["visual.proj"] = torch.zeros(16, 13)
    del weights["ln_final.bias"]
    torch.save(weights, tmp_path / "wrong.pt")
    with pytest.raises(
        ValueError, match=r"do not fit .* in 2 tensors: text_model.final_layer_norm.bias \(needs \(16,\), got None\)"
    ):
        HPSv2(folder, tmp_path / "wrong.pt", device="cpu").load()


def test_a_pickle_with_code_in_it_is_refused(tmp_path, clip_folder):
    torch.save({"state_dict": Path("x")}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="must be tensors and nothing else"):
        HPSv2(clip_folder, tmp_path / "code.pt", device="cpu").load()
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="must be a dictionary of tensors"):
        pretrained.load_weights(tmp_path / "list.pt")
    with pytest.raises(ValueError, match="weights must be a file that exists, or 'owner/repository/file'"):
        pretrained.resolve_weights("missing.pt")
    assert pretrained.resolve_weights("xswu/HPSv2/HPS_v2.1_compressed.pt") == "xswu/HPSv2/HPS_v2.1_compressed.pt"


@pytest.mark.gpu
def test_score_on_a_gpu_is_that_on_the_cpu(clip_folder):
    images = random_images(5)
    reward = ClipScore(clip_folder, device="cuda:0")
    expected = ClipScore(clip_folder, device="cpu")(images, PROMPTS, [{}] * 5)
    np.testing.assert_allclose(reward(images, PROMPTS, [{}] * 5), expected, atol=1e-4)
    assert reward.loaded.model.device.type == "cuda"
    reward.unload()
