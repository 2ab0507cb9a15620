"""Pretrain the bundled Stable Diffusion on a CPU: first the VAE, then the text encoder together with the denoiser.

    python scripts/bundled_models/pretrain_tiny.py --output-folder ddpo_env/data/tiny

The model learns from renderings of emoji. The same arguments give the same result, up to the machine's rounding. An
interrupted run continues when it is started again with the same arguments. `docs/tiny-model.md` has the command for the
bundled weights and its time; `scripts/bundled_models/evaluate_tiny.py` measures them.
"""

import copy
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from diffusers import AutoencoderKL, UNet2DConditionModel
from pretraining.emoji_renderings import Mixture, all_subjects, grid, render_dataset
from pretraining.tiny_components import (
    autocast,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
    export,
    whiten,
)
from torch import distributed, multiprocessing, nn
from transformers import CLIPTextModel


@dataclass
class Arguments:
    """Pretrain the bundled tiny Stable Diffusion."""

    run_folder: Path = Path("runs/pretrain_tiny")
    """Folder for the training state, images of reconstructions, and the newest export (`latest/`)."""
    output_folder: Path | None = None
    """A second folder for every export, such as the package's data folder."""
    seed: int = 0
    """Seed of the weights, the renderings and the batches."""
    images: int = 60_000
    """Number of renderings to train on."""
    vae: Path | None = None
    """Folder of a VAE that this script trained; None: train one. Either way, its decoder is refined at the end."""
    start: Path | None = None
    """Folder of an export whose text encoder and denoiser are trained further; None: random weights."""
    unreliable: float = 0.0
    """Weight of the renderings whose captions may overstate, next to 1.0 for all others together."""
    vae_steps: int = 1300
    """Number of updates of the VAE."""
    vae_batch_size: int = 32
    """Images per update of the VAE."""
    vae_learning_rate: float = 2e-3
    """Peak learning rate of the VAE."""
    kl_weight: float = 3e-4
    """Weight of the VAE's mean KL divergence per latent dimension."""
    decoder_steps: int = 1800
    """Number of updates of the VAE's decoder at the end, on the denoiser's latents: its images become sharper."""
    decoder_learning_rate: float = 2e-3
    """Peak learning rate of these updates."""
    steps: int = 3000
    """Number of updates of the denoiser and the text encoder."""
    batch_size: int = 64
    """Latents per update of the denoiser."""
    learning_rate: float = 1.5e-3
    """Peak learning rate of the denoiser and the text encoder."""
    warmup_steps: int = 200
    """Updates over which the learning rate rises linearly."""
    decay_fraction: float = 0.4
    """Fraction of the updates, at the end, in which it falls to zero; until then `steps` can be changed."""
    ema_decay: float = 0.999
    """Decay of the averaged weights, which are exported."""
    caption_dropout: float = 0.1
    """Fraction of the captions that are replaced by the empty prompt, for classifier-free guidance."""
    snr_cap: float = 5.0
    """Cap of the min-SNR loss weighting."""
    threads: int = 2
    """CPU threads; the denoiser trains in as many processes, and each has some of the batch's rows."""
    save_every: float = 300.0
    """Seconds between saves of the training state."""
    export_every: float = 600.0
    """Seconds between exports of the pipeline."""


def learning_rate_factor(step: int, warmup: int, decay_from: int, steps: int) -> float:
    """Return a factor in [0, 1]: linear warm-up, then 1, then cosine decay from `decay_from` to zero at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * max(0, step - decay_from) / max(1, steps - decay_from))


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """Turn `(batch, height, width, 3)` uint8 into `(batch, 3, height, width)` float32 in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def batch_indices(arguments: Arguments, stage: int, step: int, size: int) -> np.ndarray:
    """Return the images of one update; they depend on seed, stage and step only, also in a resumed run."""
    return np.random.default_rng([arguments.seed, stage, step]).integers(0, arguments.images, size)


def train_vae(arguments: Arguments, images: np.ndarray) -> AutoencoderKL:
    """Train a VAE with L1, squared error and a small KL divergence; it takes minutes and cannot be resumed."""
    vae = build_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=arguments.vae_learning_rate, weight_decay=1e-3)
    started = time.monotonic()
    for step in range(arguments.vae_steps):
        factor = learning_rate_factor(step, 100, 100, arguments.vae_steps)
        optimizer.param_groups[0]["lr"] = arguments.vae_learning_rate * factor
        pixels = to_tensor(images[batch_indices(arguments, 1, step, arguments.vae_batch_size)])
        with autocast():
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        error = decoded.float() - pixels
        divergence = posterior.kl().float().mean() / posterior.mean[0].numel()
        loss = error.abs().mean() + error.square().mean() + arguments.kl_weight * divergence
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == arguments.vae_steps - 1:
            print(
                f"vae {step} l1 {error.abs().mean():.4f} mse {error.square().mean():.5f} kl {divergence:.2f} "
                f"{time.monotonic() - started:.0f} s",
                flush=True,
            )
    return vae.eval().requires_grad_(False)


def refine_decoder(arguments: Arguments, vae: AutoencoderKL, images: np.ndarray, latents: torch.Tensor) -> None:
    """Train the decoder further, in place, on fixed latents with a little noise, which a denoiser leaves too."""
    parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=arguments.decoder_learning_rate, weight_decay=1e-3, fused=True)
    torch.manual_seed(arguments.seed)
    started = time.monotonic()
    for step in range(arguments.decoder_steps):
        factor = learning_rate_factor(step, 100, 100, arguments.decoder_steps)
        optimizer.param_groups[0]["lr"] = arguments.decoder_learning_rate * factor
        indices = batch_indices(arguments, 3, step, arguments.vae_batch_size)
        pixels, clean = to_tensor(images[indices]), latents[torch.from_numpy(indices)].float()
        noisy = clean + 0.1 * torch.rand(len(clean), 1, 1, 1) * torch.randn_like(clean)
        with autocast():
            decoded = vae.decode(noisy).sample
        error = decoded.float() - pixels
        loss = error.abs().mean() + error.square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 0 or step == arguments.decoder_steps - 1:
            print(
                f"decoder {step} l1 {error.abs().mean():.4f} mse {error.square().mean():.5f} "
                f"{time.monotonic() - started:.0f} s",
                flush=True,
            )
    vae.requires_grad_(False)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray) -> torch.Tensor:
    """Return the latent means of the images, `(number, 4, 16, 16)` float32."""
    with autocast():
        parts = [vae.encode(to_tensor(images[i : i + 50])).latent_dist.mean for i in range(0, len(images), 50)]
    return torch.cat(parts).float()


@torch.no_grad()
def save_reconstructions(vae: AutoencoderKL, images: np.ndarray, path: Path) -> None:
    """Write rows of images, each with a row of the VAE's reconstructions below."""
    decoded = vae.decode(vae.encode(to_tensor(images)).latent_dist.mean).sample
    pixels = ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    rows = [image for i in range(0, len(images), 12) for image in (*images[i : i + 12], *pixels[i : i + 12])]
    grid(rows, columns=12, scale=2).save(path)


class Denoising(nn.Module):
    """The text encoder and the denoiser, which are trained together, and their loss."""

    signal: torch.Tensor
    noise: torch.Tensor
    weight: torch.Tensor

    def __init__(self, text_encoder: nn.Module, unet: nn.Module, snr_cap: float) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet.to(memory_format=torch.channels_last)  # convolutions are faster
        alphas = build_scheduler().alphas_cumprod
        self.register_buffer("signal", alphas.sqrt(), persistent=False)
        self.register_buffer("noise", (1 - alphas).sqrt(), persistent=False)
        # Min-SNR weighting (Hang et al. 2023) of the v-prediction loss: min(SNR, cap) / (SNR + 1).
        snr = alphas / (1 - alphas).clamp(min=1e-12)
        self.register_buffer("weight", snr.clamp(max=snr_cap) / (snr + 1), persistent=False)

    def loss(self, latents: torch.Tensor, token_ids: torch.Tensor, rows: slice) -> torch.Tensor:
        """Return the weighted v-prediction loss of some rows of a batch.

        Args:
            latents: `(batch, 4, 16, 16)`.
            token_ids: Their captions, `(batch, 16)`.
            rows: The rows of this process. Every process draws timesteps and noise for the whole batch.
        """
        batch = len(latents)
        # Stratified timesteps: every update covers the whole schedule.
        timesteps = ((torch.arange(batch) + torch.rand(batch)) / batch * len(self.signal)).long()
        signal, noise_level = self.signal[timesteps, None, None, None], self.noise[timesteps, None, None, None]
        noise = torch.randn_like(latents)
        noisy, target = signal * latents + noise_level * noise, signal * noise - noise_level * latents
        noisy, target, timesteps, token_ids = noisy[rows], target[rows], timesteps[rows], token_ids[rows]
        with autocast():
            text = self.text_encoder(token_ids)[0]
            predicted = self.unet(noisy, timesteps, text).sample
        errors = (predicted.float() - target).square().mean(dim=(1, 2, 3))
        return (self.weight[timesteps] * errors).mean()


class TrainingState:
    """What a run needs to continue: weights, averaged weights, optimizer and step."""

    def __init__(self, arguments: Arguments) -> None:
        self.path = arguments.run_folder / "denoiser.pt"
        self.tokenizer = build_tokenizer(subject.caption for subject in all_subjects())
        text_encoder, unet = build_text_encoder(self.tokenizer), build_unet()
        if arguments.start is not None:
            text_encoder = CLIPTextModel.from_pretrained(arguments.start / "text_encoder")
            unet = UNet2DConditionModel.from_pretrained(arguments.start / "unet")
        self.model = Denoising(text_encoder, unet, arguments.snr_cap)
        self.averaged, self.step = copy.deepcopy(self.model).requires_grad_(False), 0
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.99), weight_decay=1e-2, fused=True
        )

    def load(self) -> None:
        """Load the saved state if there is one."""
        if self.path.is_file():
            saved = torch.load(self.path, weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.averaged.load_state_dict(saved["averaged"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step = saved["step"]
            print(f"resumed at step {self.step}", flush=True)

    def save(self) -> None:
        """Replace the saved state by a rename, so that an interrupted run leaves a complete one."""
        state = {
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        fresh = self.path.with_suffix(".new")
        torch.save(state, fresh)
        fresh.replace(self.path)

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """Move the averaged weights towards the current ones, faster during the first updates."""
        decay = min(decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.averaged.parameters()), list(self.model.parameters()), 1 - decay)


def average_gradients(model: nn.Module, processes: int) -> None:
    """Average the gradients over the processes, in place."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    pieces = (flat / processes).split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [piece.view_as(g) for piece, g in zip(pieces, gradients, strict=True)])


def train_denoiser(
    arguments: Arguments, rank: int, state: TrainingState, latents: torch.Tensor, token_ids: torch.Tensor
) -> Iterator[int]:
    """Train in place, on every `arguments.threads`-th row of each batch; yield the number of finished updates.

    Args:
        arguments: Settings of the run.
        rank: Index of this process; its rows are `rank`, `rank + threads`, ...
        state: What is trained.
        latents: `(images, 4, 16, 16)`.
        token_ids: `(images + 1, 16)`; the last row is the empty prompt.
    """
    started, first, losses = time.monotonic(), state.step, []
    rows = slice(rank, None, arguments.threads)
    decay_from = round(arguments.steps * (1 - arguments.decay_fraction))
    while state.step < arguments.steps:
        factor = learning_rate_factor(state.step, arguments.warmup_steps, decay_from, arguments.steps)
        state.optimizer.param_groups[0]["lr"] = arguments.learning_rate * factor
        indices = torch.from_numpy(batch_indices(arguments, 2, state.step, arguments.batch_size))
        torch.manual_seed(arguments.seed * 1_000_003 + state.step)  # the same noise in every process
        dropped = torch.rand(len(indices)) < arguments.caption_dropout
        ids = token_ids[torch.where(dropped, len(token_ids) - 1, indices)]
        state.optimizer.zero_grad(set_to_none=True)
        loss = state.model.loss(latents[indices].float(), ids, rows)
        loss.backward()
        average_gradients(state.model, arguments.threads)
        nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
        state.optimizer.step()
        state.step += 1
        state.average(arguments.ema_decay)
        losses.append(loss.item())
        if state.step % 100 == 0 and rank == 0:
            each = (time.monotonic() - started) / (state.step - first)
            left = each * (arguments.steps - state.step) / 60
            print(
                f"denoiser {state.step} loss {np.mean(losses[-100:]):.4f} {each * 1e3:.0f} ms/step {left:.0f} min left",
                flush=True,
            )
        yield state.step


def train_process(rank: int, arguments: Arguments, latents: torch.Tensor, token_ids: torch.Tensor) -> None:
    """Train the denoiser in one of several processes with one thread each; the first one saves and exports.

    Processes wait for each other once per update, threads in every layer. So a busy machine slows processes less.
    """
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    rendezvous = (arguments.run_folder / "rendezvous").absolute()
    distributed.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=arguments.threads)
    torch.manual_seed(arguments.seed)
    state = TrainingState(arguments)
    state.load()
    saved = time.monotonic()
    exported = saved - arguments.export_every + 60  # the first export comes after a minute
    for _ in train_denoiser(arguments, rank, state, latents, token_ids):
        now = time.monotonic()
        if rank == 0 and now - saved > arguments.save_every:
            state.save()
            saved = now
        if rank == 0 and now - exported > arguments.export_every:
            export_averaged(arguments, state, AutoencoderKL.from_pretrained(arguments.run_folder / "vae"))
            exported = now
    if rank == 0:
        state.save()
    distributed.barrier()
    distributed.destroy_process_group()


def export_averaged(arguments: Arguments, state: TrainingState, vae: AutoencoderKL) -> None:
    """Write the pipeline with the averaged weights."""
    folders = [arguments.run_folder / "latest", *([arguments.output_folder] if arguments.output_folder else [])]
    export(folders, state.tokenizer, state.averaged.text_encoder, vae, state.averaged.unet)
    print(f"exported at step {state.step}", flush=True)


def trained_vae(arguments: Arguments, images: np.ndarray) -> tuple[AutoencoderKL, torch.Tensor]:
    """Return the VAE, trained now or when this run was started before, and the images' latents in float16."""
    folder = arguments.run_folder / "vae"
    if not folder.exists():
        if arguments.vae is None:
            vae = train_vae(arguments, images)
            whiten(vae, encode(vae, images[:5000]))
        else:
            vae = AutoencoderKL.from_pretrained(arguments.vae)
        save_reconstructions(vae, images[:60], arguments.run_folder / "vae.png")
        vae.save_pretrained(folder)
    vae = AutoencoderKL.from_pretrained(folder).eval().requires_grad_(False)
    cached = folder / "latents.pt"
    if not cached.is_file():
        torch.save(encode(vae, images).half(), cached)
    latents = torch.load(cached, weights_only=True)
    print(f"latents: mean {latents.float().mean():.3f} std {latents.float().std():.3f}", flush=True)
    return vae, latents


def main() -> None:
    """Parse the command line and run the stages in order."""
    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    arguments.run_folder.mkdir(parents=True, exist_ok=True)
    (arguments.run_folder / "rendezvous").unlink(missing_ok=True)
    started = time.monotonic()
    mixture = Mixture(unreliable=arguments.unreliable)
    images, subjects = render_dataset(arguments.images, arguments.seed, mixture=mixture, workers=arguments.threads)
    print(f"rendered {len(images)} images in {time.monotonic() - started:.0f} s", flush=True)
    vae, latents = trained_vae(arguments, images)

    state = TrainingState(arguments)
    captions = [*(subject.caption for subject in subjects), ""]
    token_ids = state.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    multiprocessing.spawn(train_process, (arguments, latents, token_ids), nprocs=arguments.threads)
    state.load()
    export_averaged(arguments, state, vae)
    refine_decoder(arguments, vae, images, latents)
    save_reconstructions(vae, images[:60], arguments.run_folder / "vae_refined.png")
    export_averaged(arguments, state, vae)
    print(f"finished in {(time.monotonic() - started) / 60:.1f} min", flush=True)


if __name__ == "__main__":
    main()
