"""Predict the time of an iteration on many processes from a few constants, and check the prediction against runs.

    python scripts/benchmarks/cost_model.py
    python scripts/benchmarks/cost_model.py --plan

The constants are the seconds of a row of the denoiser (with and without gradient), a decoded image, an encoded prompt,
a scored image, an optimizer step and an exchanged byte. They are measured in all processes at the same time. The
script predicts the time of an iteration from them, and times real iterations with the same number of processes.
`--plan` measures nothing. It evaluates the model for numbers of GPUs, with assumed constants.
"""

import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table
from scaling import Arguments, as_json, configuration, describe_machine, launch, turn

WORKER = "--worker"
_REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Seconds on one process, unless said otherwise.

    Attributes:
        forward: one row of the denoiser, which is one latent, in sampling.
        training: one row in training, with the gradient of the weights that learn.
        decode: one image, decoded by the VAE.
        encode: one new prompt.
        reward: the score of one image.
        update: gradient clipping and one optimizer step.
        exchange: one exchange between processes, without its bytes.
        byte: each byte of an exchange.
        exchanged: not seconds but bytes: the size of the weights that learn.
    """

    forward: float
    training: float
    decode: float
    encode: float
    reward: float
    update: float
    exchange: float
    byte: float
    exchanged: int


@dataclass(frozen=True)
class Workload:
    """The work of one iteration, of all processes together.

    Attributes:
        images: number of generated images.
        sampled: rows of the denoiser in sampling.
        trained: rows of the denoiser in training.
        recomputed: rows without gradient, which compute log-probabilities again in half precision.
        prompts: number of new prompts.
        updates: number of optimizer steps.
        rollout: bytes of all latents of all trajectories.
        overlaps: whether rewards take no extra time, because another machine or a free core computes them. If not, the
            denoiser waits for them, as on a CPU whose cores are all busy.
    """

    images: int
    sampled: int
    trained: int
    recomputed: int
    prompts: int
    updates: int
    rollout: int
    overlaps: bool = False


@dataclass(kw_only=True)
class Choices(Arguments):
    """The work of an iteration; the defaults are those of train_ppo.py."""

    plan: bool = False
    """Evaluate the model for numbers of GPUs, with assumed constants; measure nothing."""


ASSUMED = Constants(
    forward=0.804e12 / 300e12,
    training=1.714e12 / 300e12,
    decode=2.515e12 / 300e12,
    encode=5e-3,
    reward=4e-3,
    update=10e-3,
    exchange=200e-6,
    byte=1 / 20e9,
    exchanged=4 * 797_184,
)
"""Stable Diffusion 1.4 at 512² with a LoRA of rank 4 on one H200: assumed, not measured. `agents.planning.flops` counts
the operations, at 300 TFLOP/s in bfloat16; a JPEG takes one core 4 ms; machines exchange 20 GB/s."""
IMAGES_PER_GPU = 32
"""Images per iteration and GPU in the plan; 8 GPUs generate the paper's 256."""


def plan() -> Table:
    """Return the seconds of an iteration of the paper's compressibility task, with `IMAGES_PER_GPU` images per GPU."""
    gpus = (1, 8, 64, 1000)
    columns = []
    for count in gpus:
        images = IMAGES_PER_GPU * count
        rows = images * 50 * 2
        rollout = 4 * 16_384 * images * 51
        work = Workload(images, rows, rows, recomputed=rows, prompts=images, updates=4, rollout=rollout, overlaps=True)
        columns.append(predict(ASSUMED, work, count) | {"rollout in every process, GB": rollout / 1e9})
    table = Table("seconds of an iteration", *(f"{count} GPUs" for count in gpus), title="constants are assumed")
    for name in columns[0]:
        table.add_row(name, *(f"{column[name]:.2f}" for column in columns))
    return table


def predict(constants: Constants, work: Workload, processes: int) -> dict[str, float]:
    """Return the seconds of an iteration, by what takes the time."""
    divided = {
        "UNet, sampling": work.sampled * constants.forward,
        "VAE": work.images * constants.decode,
        "text": work.prompts * constants.encode,
        "reward": 0.0 if work.overlaps else work.images * constants.reward,
        "UNet, log-probabilities": work.recomputed * constants.forward,
        "UNet, training": work.trained * constants.training,
    }
    seconds = {name: value / processes for name, value in divided.items()}
    seconds["optimizer"] = work.updates * constants.update
    exchanges = 0.0
    if processes > 1:
        # An update sums gradients and metrics, and compares errors; every process gathers the whole rollout.
        exchanges = 3 * work.updates * constants.exchange + work.updates * constants.exchanged * constants.byte
        exchanges += 20 * constants.exchange + work.rollout * constants.byte
    return seconds | {"communication": exchanges}


def timed(work: Callable[[], Any]) -> float:
    """Return the median seconds of a call; a first call is not timed."""
    work()
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure(arguments: Arguments, output: Path) -> None:
    """Measure the constants in this process while the other processes do the same; the main one writes the means."""
    import numpy as np
    import torch

    from agents import DiffusionPolicy, prepare_run
    from agents.planning.memory import fit_micro_batch_size
    from rewards import evaluate_reward

    torch.set_num_threads(1)
    algorithm = prepare_run(configuration(arguments, output.with_name("run"))).algorithm
    processes, policy = algorithm.processes, algorithm.policy
    assert algorithm.env is not None
    assert isinstance(policy, DiffusionPolicy)
    model, rows, reward = policy.model, algorithm.n_envs, algorithm.env.get_attr("reward")[0]
    learning = policy.trainable_parameters()

    def inputs(count: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        embeds = model.encode_prompts(["a cat"])
        conditioning = {name: value.expand(count, *value.shape[1:]) for name, value in embeds.items()}
        return torch.randn(count, *model.latent_shape), torch.full((count,), 500.0), conditioning

    pairs = arguments.train_batch_size or fit_micro_batch_size(algorithm)
    sampling, training = inputs(rows), inputs(pairs)
    images = model.decode(torch.randn(rows, *model.latent_shape)).cpu().numpy()
    numbers = itertools.count()
    gradients = torch.zeros(sum(weight.numel() for weight in learning))
    small = torch.zeros(8)

    def backward() -> None:
        policy.predict_output(*training).square().mean().backward()

    def update() -> None:
        for weight in learning:
            weight.grad = torch.zeros_like(weight)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        policy.optimizer.step()
        policy.optimizer.zero_grad()

    processes.gather_objects(None)
    with torch.no_grad():
        found = {
            "forward": timed(lambda: policy.predict_output(*sampling)) / rows,
            "decode": timed(lambda: model.decode(sampling[0])) / rows,
            "encode": timed(lambda: model.encode_prompts([f"animal {next(numbers)}"])),
        }
    found["training"] = timed(backward) / pairs
    found["reward"] = timed(lambda: evaluate_reward(reward, images, ["a cat"] * rows, [{}] * rows)) / rows
    found["update"] = timed(update)
    processes.gather_objects(None)
    found["exchange"] = timed(lambda: processes.sum(small))
    all_gradients = timed(lambda: processes.sum(gradients))
    found["byte"] = max(0.0, all_gradients - found["exchange"]) / gradients.nbytes
    gathered = processes.gather_objects(found)
    if processes.is_main:
        means = {name: float(np.mean([one[name] for one in gathered])) for name in found}
        output.write_text(json.dumps(means | {"exchanged": gradients.nbytes}))
    processes.shutdown()


def constants_of(arguments: Arguments, processes: int) -> Constants:
    """Measure the constants in `processes` processes at once."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "constants.json"
        launch([__file__, WORKER, as_json(arguments), str(output)], processes)
        return Constants(**json.loads(output.read_text()))


def workload_of(arguments: Arguments) -> Workload:
    """Return the work of one iteration; its prompts were encoded in earlier iterations."""
    from agents.planning.plan import denoiser_rows
    from ddpo_env.models.outline import outline_model

    config = configuration(arguments, Path("unused")).resolved()
    rows = denoiser_rows(config)
    outline = outline_model(arguments.model)
    assert outline is not None
    images = arguments.samples
    return Workload(
        images=images,
        sampled=rows.sampling // config.total_iterations,
        trained=rows.training // config.total_iterations,
        recomputed=rows.measuring // config.total_iterations,
        prompts=0,
        updates=arguments.updates,
        rollout=4 * math.prod(outline.latent_shape) * images * (arguments.num_inference_steps + 1),
    )


def check(arguments: Arguments, console: Console) -> dict[str, Any]:
    """Compare predicted and measured seconds of one process and of several."""
    work = workload_of(arguments)
    counts = (1, arguments.processes)
    turns: dict[int, list[Turn]] = {count: [] for count in counts}
    for _ in range(arguments.repeats):  # in turns, so that other users of the machine slow all of them down equally
        for count in counts:
            predicted = predict(constants := constants_of(arguments, count), work, count)
            measured = arguments.samples / turn(arguments, count)["iteration"]
            turns[count].append(Turn(constants, predicted, measured))
        ratios = ", ".join(f"{count}: {turns[count][-1].ratio:.2f}" for count in counts)
        console.print(f"predicted over measured, by number of processes: {ratios}")
    return {
        "processes": {str(count): describe_turns(of_count) for count, of_count in turns.items()},
        "speedup": statistics.median(
            one.measured / many.measured for one, many in zip(turns[1], turns[arguments.processes], strict=True)
        ),
        "arguments": {name: str(value) for name, value in vars(arguments).items()},
        **describe_machine(),
    }


@dataclass(frozen=True)
class Turn:
    """Constants, predicted seconds by what takes the time, and measured seconds of an iteration."""

    constants: Constants
    predicted: dict[str, float]
    measured: float

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return sum(self.predicted.values()) / self.measured


def describe_turns(turns: list[Turn]) -> dict[str, Any]:
    """Return the figures of the turn with the median ratio, and all ratios."""
    middle = sorted(turns, key=lambda one: one.ratio)[len(turns) // 2]
    return {
        "constants": asdict(middle.constants),
        "predicted_seconds": middle.predicted,
        "predicted_iteration_seconds": sum(middle.predicted.values()),
        "measured_iteration_seconds": middle.measured,
        "predicted_over_measured": middle.ratio,
        "all_ratios": [one.ratio for one in turns],
    }


def main() -> int:
    """Compare prediction and measurement, and print and write the figures; or print the plan."""
    if sys.argv[1:2] == [WORKER]:
        measure(Arguments(**json.loads(sys.argv[2])), Path(sys.argv[3]))
        return 0
    console = Console()
    arguments = tyro.cli(Choices, description=__doc__)
    if arguments.plan:
        console.print(plan())
        return 0
    text = json.dumps(check(arguments, console), indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
