"""A diffusion model of points in the plane: a very small denoiser that has not learned anything yet.

It shows that reinforcement learning can train a denoiser from scratch, in seconds, and that everything in this package
goes through `DiffusionModel`: there is no text encoder, no decoder and no pipeline here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from diffusers import DDIMScheduler
from diffusers.models.embeddings import Timesteps
from PIL import Image, ImageDraw
from torch import Tensor, nn

from ddpo_env.models.protocol import Conditioning, ModelAbilities
from ddpo_env.models.quantization import loaded_dtype

_TRAIN_TIMESTEPS = 100
_TIMESTEP_CHANNELS = 32
_HIDDEN = 64
_SEED = 0
_CANVAS = 64
_CANVAS_RADIUS = 2.5


def points_scheduler() -> DDIMScheduler:
    """Return the noise schedule: 100 training timesteps, for 1 to 50 steps at `eta=1`.

    A policy needs noise at its last step too. As in Stable Diffusion, the chain ends at the first training timestep,
    whose noise is √0.01, and not at perfectly clean latents (`set_alpha_to_one=False`). The last step's standard
    deviation is then between 0.07 and 0.1 for any number of steps, a tenth of the scale of the points. `trailing`
    timesteps begin at the noisiest one even in a single step. With at most 50 steps they never reach the first
    timestep, whose step would have no noise. The network predicts the clean point (`sample`), so its error is the error
    of the point; with `epsilon` the first step would multiply the error by 30.
    """
    return DDIMScheduler(
        num_train_timesteps=_TRAIN_TIMESTEPS,
        beta_start=0.01,
        beta_end=0.12,
        beta_schedule="linear",
        prediction_type="sample",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
    )


class PointsDenoiser(nn.Module):
    """`x0_hat = √ᾱ_t · x_t + MLP(x_t, t)`, where the last layer of the MLP starts at zero.

    So a fresh network is the best denoiser of a standard Gaussian, and a fresh policy samples points from roughly that.
    """

    signal: Tensor

    def __init__(self, alphas_cumprod: Tensor) -> None:
        """Take the schedule's ᾱ, `(num_train_timesteps,)`."""
        super().__init__()
        self.register_buffer("signal", alphas_cumprod.sqrt())
        self.timestep_embedding = Timesteps(_TIMESTEP_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.mlp = nn.Sequential(
            nn.Linear(2 + _TIMESTEP_CHANNELS, _HIDDEN), nn.SiLU(), nn.Linear(_HIDDEN, _HIDDEN), nn.SiLU()
        )
        self.out = nn.Linear(_HIDDEN, 2)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """Return the predicted clean points `(batch, 2)` for latents `(batch, 2)` at timesteps `(batch,)`."""
        embedding = self.timestep_embedding(timestep).to(latents.dtype)
        hidden = self.mlp(torch.cat([latents, embedding], dim=1))
        return self.signal[timestep.long()][:, None] * latents + cast(Tensor, self.out(hidden))


class PointsModel(ModelAbilities):
    """Points in the plane as a `DiffusionModel`: latents are the points, and prompts have no effect.

    The weights come from a fixed seed, so they are the same in every process. If a reward has several maxima, a policy
    that is trained for long enough keeps only the nearest one, because nothing here rewards diversity.
    """

    sample_kind = "other"

    def __init__(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """Make the fresh network on a device, in a dtype."""
        self.source = "points"
        self.latent_shape: tuple[int, ...] = (2,)
        self.conditioning_shapes: dict[str, tuple[int, ...]] = {}
        self.scheduler = points_scheduler()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_SEED)  # only the CPU's generator, which is restored
            denoiser = PointsDenoiser(self.scheduler.alphas_cumprod)
        self.denoiser: nn.Module = denoiser.to(device=device, dtype=dtype).requires_grad_(False).eval()

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return no conditioning."""
        return {}

    def decode(self, latents: Tensor) -> Tensor:
        """Return the points themselves, `(batch, 2)` float32."""
        return latents.float()

    def decode_with_gradient(self, latents: Tensor) -> Tensor:
        """Return the points themselves, `(batch, 2)` float32."""
        return latents.float()

    def predict(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the predicted clean points `(batch, 2)`."""
        dtype = loaded_dtype(denoiser)
        return cast(Tensor, denoiser(latents.to(dtype), timestep))

    def render(self, latents: Tensor) -> Tensor:
        """Return uint8 images `(batch, 64, 64, 3)` of points `(batch, 2)`: one red point, the rest of the batch grey.

        The canvas shows [-2.5, 2.5]²; points outside are not seen.
        """
        pixels = (latents.float().cpu() * torch.tensor([1, -1]) / _CANVAS_RADIUS + 1) * (_CANVAS - 1) / 2
        everything = Image.new("RGB", (_CANVAS, _CANVAS), "white")
        for point in pixels.tolist():
            _dot(everything, point, 1, "lightgrey")
        images = []
        for point in pixels.tolist():
            image = everything.copy()
            _dot(image, point, 2, "crimson")
            images.append(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8))
        return torch.stack(images).reshape(-1, _CANVAS, _CANVAS, 3)

    def save_lora(self, denoiser: nn.Module, folder: Path) -> None:
        """Refuse: there are no attention layers to adapt, and no pipeline to read a LoRA.

        Raises:
            ValueError: always.
        """
        raise ValueError("model 'points' has no LoRA: train every weight with lora_rank=0, and save the policy itself")


def _dot(image: Image.Image, point: Sequence[float], radius: int, colour: str) -> None:
    x, y = point
    ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
