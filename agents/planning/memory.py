"""`train_batch_size=0`: as many (sample, timestep) pairs in one training call as fit into the memory.

On a CPU a call has at most `CPU_ROWS` rows. On an accelerator a real call is tried with all pairs of an update, and the
size is halved as long as memory runs out. The result is written to `config.yaml`, so a resumed run has the same calls.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate.utils import find_executable_batch_size

from agents.algorithms.on_policy import TensorOnPolicyAlgorithm
from agents.config.sizes import largest_divisor
from agents.policy.diffusion_policy import DiffusionPolicy

CPU_ROWS = 32
"""From 8 to 32 rows an iteration took 16 % less time on a CPU (docs/performance.md); more rows gained nothing."""


def fit_micro_batch_size(algorithm: TensorOnPolicyAlgorithm) -> int:
    """Return the number of transitions per training call that fits, the same in all processes.

    Args:
        algorithm: with a `DiffusionPolicy` on its device, before the first iteration.

    Raises:
        RuntimeError: if not even one transition fits.
    """
    policy, processes = algorithm.policy, algorithm.processes
    assert isinstance(policy, DiffusionPolicy)
    most = algorithm.batch_size or algorithm.n_steps * algorithm.n_envs * processes.count
    if policy.device.type == "cpu":
        return largest_divisor(most, CPU_ROWS // (2 if policy.negative_conditioning else 1))
    with processes.fail_together():
        fitting = largest_fitting(most, lambda rows: _training_call(algorithm, policy, rows))
    return min(processes.gather_objects(fitting))


def largest_fitting(most: int, call: Callable[[int], None]) -> int:
    """Return the largest size for which a call does not run out of memory: `most`, or a divisor of it.

    Raises:
        RuntimeError: if a call of size 1 runs out of memory.
    """
    size = most

    def halve() -> int:
        nonlocal size
        size = largest_divisor(most, size // 2) if size > 1 else 0
        return size

    @find_executable_batch_size(starting_batch_size=most, reduce_batch_size_fn=halve)
    def fitting(batch_size: int) -> int:
        call(batch_size)
        return batch_size

    return int(fitting())


def _training_call(algorithm: TensorOnPolicyAlgorithm, policy: DiffusionPolicy, rows: int) -> None:
    """Run one training call on zeros, beside everything that an update holds meanwhile.

    That is the gradients of the calls before it, the optimizer's state, the averaged weights, and the conditioning of
    all episodes of the rollout. The rollout's latents are allocated already.
    """
    learning = policy.trainable_parameters()
    steps = algorithm.n_steps * algorithm.n_envs * algorithm.processes.count
    observation = _zeros(policy, rows)
    held = [torch.empty_like(weight) for weight in learning for _ in range(2 + len(algorithm.averages()))]
    held += _zeros(policy, -(-steps // policy.num_inference_steps)).values()
    for weight in learning:
        weight.grad = torch.zeros_like(weight)
    timestep = policy.sampler.timesteps[:1].to(policy.device, torch.float32).expand(rows)
    latents, actions = (torch.zeros(rows, *policy.model.latent_shape, device=policy.device) for _ in range(2))
    observation |= {"latents": latents, "timestep": timestep}
    try:
        evaluate = policy.evaluate_with_reference if algorithm.options.kl_coef else policy.evaluate_actions
        evaluate(observation, actions)[1].mean().backward()
    finally:
        for weight in learning:
            weight.grad = None
        del held


def _zeros(policy: DiffusionPolicy, rows: int) -> dict[str, torch.Tensor]:
    """Return conditioning of `rows` rows on the policy's device."""
    shapes = policy.model.conditioning_shapes
    return {name: torch.zeros(rows, *shape, device=policy.device) for name, shape in shapes.items()}
