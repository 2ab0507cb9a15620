"""`train_batch_size=0`: as many (sample, timestep) pairs in one training call as fit into the memory.

On a CPU a call has at most `CPU_ROWS` rows. On an accelerator a real call is tried with all pairs of an update, and the
size is halved as long as memory runs out. The result is written to `config.yaml`, so a resumed run has the same calls.
"""

from __future__ import annotations

import torch
from accelerate.utils import find_executable_batch_size

from agents.config.sizes import largest_divisor
from agents.config.train_config import TrainConfig
from agents.distributed import Processes
from agents.planning.plan import pairs_per_update
from agents.policy.diffusion_policy import DiffusionPolicy

CPU_ROWS = 32
"""From 8 to 32 rows an iteration took 16 % less time on a CPU (docs/performance.md); more rows gained nothing."""


def fitting_train_batch_size(config: TrainConfig, policy: DiffusionPolicy, processes: Processes) -> int:
    """Return the number of pairs per training call, the same in all processes.

    Args:
        config: resolved.
        policy: of the run, on its device.
        processes: that train together.

    Raises:
        RuntimeError: if not even one pair fits.
    """
    pairs = pairs_per_update(config)
    if policy.device.type == "cpu":
        return largest_divisor(pairs, CPU_ROWS // (2 if policy.negative_conditioning else 1))
    with processes.fail_together():
        fitting = _largest_call(config, policy, pairs)
    return min(processes.gather_objects(fitting))


def _largest_call(config: TrainConfig, policy: DiffusionPolicy, pairs: int) -> int:
    sizes = [pairs]

    def halve() -> int:
        sizes.append(largest_divisor(pairs, sizes[-1] // 2) if sizes[-1] > 1 else 0)
        return sizes[-1]

    @find_executable_batch_size(starting_batch_size=pairs, reduce_batch_size_fn=halve)
    def fitting(batch_size: int) -> int:
        _training_call(config, policy, batch_size)
        return batch_size

    return int(fitting())


def _training_call(config: TrainConfig, policy: DiffusionPolicy, pairs: int) -> None:
    """Run one training call on zeros, beside what the optimizer and the averaged weights will hold."""
    learning = policy.trainable_parameters()
    copies = 2 + bool(config.update.ema_decay)
    held = [torch.empty_like(weight) for weight in learning for _ in range(copies)]
    latents = torch.zeros(pairs, *policy.model.latent_shape, device=policy.device)
    observation = {
        name: torch.zeros(pairs, *shape, device=policy.device)
        for name, shape in policy.model.conditioning_shapes.items()
    }
    timestep = policy.sampler.timesteps[:1].to(policy.device, torch.float32).expand(pairs)
    observation |= {"latents": latents, "timestep": timestep}
    try:
        evaluate = policy.evaluate_with_reference if config.update.kl_coef else policy.evaluate_actions
        evaluate(observation, latents)[1].mean().backward()
    finally:
        for weight in learning:
            weight.grad = None
        del held
