"""What an iteration costs on many processes: a model of a few constants, measured here, and checked against runs.

Measures the constants (seconds of a denoiser's row with and without gradient, of a decoded picture, an encoded prompt,
a scored picture, an optimizer step, an exchanged byte) in as many processes at once as share the machine, predicts the
iteration, and times real iterations of as many processes beside it. With `--plan` nothing is measured: the model is
evaluated for fleets of GPUs, with constants that are stated and not measured.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from benchmark_scaling import Arguments, as_json, configuration, describe_machine, launch, turn
from rich.console import Console
from rich.table import Table

WORKER = "--worker"
_REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Seconds on one process, unless said otherwise.

    Attributes:
        forward: of a row: the denoiser called on one latent, in sampling.
        training: of a row with the gradient of what learns.
        decode: of a picture by the VAE.
        encode: of a prompt that is met for the first time.
        reward: of a picture's score.
        update: of clipping and the optimizer's step.
        exchange: of an exchange between processes, whatever its size.
        byte: of one byte more in it.
        exchanged: bytes of what learns.
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
class Iteration:
    """What is done in an iteration by all processes together.

    Attributes:
        pictures: that are drawn.
        sampled: rows of the denoiser in sampling.
        trained: rows of the denoiser in training.
        again: rows without gradient, by which half precision computes the log-probabilities again.
        prompts: that are encoded for the first time.
        updates: optimizer steps.
        rollout: bytes of all latents of all trajectories.
        overlaps: whether rewards cost no time of their own, because another machine or a second core has them; else
            they take their turn with the denoiser, as on a CPU of which every core is busy.
    """

    pictures: int
    sampled: int
    trained: int
    again: int
    prompts: int
    updates: int
    rollout: int
    overlaps: bool = False


@dataclass(kw_only=True)
class Choices(Arguments):
    """The work of an iteration; the defaults are those of train_ppo.py."""

    plan: bool = False
    """Evaluate the model for fleets of GPUs, with constants that are stated and not measured."""


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
"""SD 1.4 at 512² with a LoRA of rank 4 on one H200, assumed and not measured: the operations that `agents.planning.flops` counts
at 300 TFLOP/s in bfloat16, 4 ms for a JPEG in one core, 20 GB/s between machines."""
PICTURES_A_GPU = 32
"""In an iteration of the plan; on 8 GPUs that makes the paper's 256."""


def plan() -> Table:
    """Return the seconds of an iteration of the paper's compressibility task, with a fleet's share of pictures."""
    fleets = (1, 8, 64, 1000)
    columns = []
    for count in fleets:
        pictures = PICTURES_A_GPU * count
        rows = pictures * 50 * 2
        rollout = 4 * 16_384 * pictures * 51
        work = Iteration(pictures, rows, rows, again=rows, prompts=pictures, updates=4, rollout=rollout, overlaps=True)
        columns.append(predict(ASSUMED, work, count) | {"rollout in every process, GB": rollout / 1e9})
    table = Table("seconds of an iteration", *(f"{count} GPUs" for count in fleets), title="constants are assumed")
    for name in columns[0]:
        table.add_row(name, *(f"{column[name]:.2f}" for column in columns))
    return table


def predict(constants: Constants, work: Iteration, processes: int) -> dict[str, float]:
    """Return the seconds of an iteration by what they are spent on."""
    shared = {
        "UNet, sampling": work.sampled * constants.forward,
        "VAE": work.pictures * constants.decode,
        "text": work.prompts * constants.encode,
        "reward": 0.0 if work.overlaps else work.pictures * constants.reward,
        "UNet, again": work.again * constants.forward,
        "UNet, training": work.trained * constants.training,
    }
    seconds = {name: value / processes for name, value in shared.items()}
    seconds["optimizer"] = work.updates * constants.update
    exchanges = 0.0
    if processes > 1:
        # An update sums gradients and metrics and agrees on errors; a rollout is gathered by everybody.
        exchanges = 3 * work.updates * constants.exchange + work.updates * constants.exchanged * constants.byte
        exchanges += 20 * constants.exchange + work.rollout * constants.byte
    return seconds | {"communication": exchanges}


def timed(work: Callable[[], Any]) -> float:
    """Return the median seconds of a call, after one that is not counted."""
    work()
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure(arguments: Arguments, output: Path) -> None:
    """Measure the constants in this process, while the others of its run do the same; the main one writes the means."""
    import numpy as np
    import torch

    from agents.policy.diffusion_policy import DiffusionPolicy
    from agents.training.preparation import prepare_run
    from rewards import evaluate_reward

    torch.set_num_threads(1)
    algorithm = prepare_run(configuration(arguments, output.with_name("run"))).algorithm
    processes, policy = algorithm.processes, algorithm.policy
    assert algorithm.env is not None
    assert isinstance(policy, DiffusionPolicy)
    model, rows, reward = policy.model, algorithm.n_envs, algorithm.env.get_attr("reward")[0]
    learning = [weight for weight in policy.parameters() if weight.requires_grad]

    def inputs(count: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        embeds = model.encode_prompts(["a cat"])
        conditioning = {name: value.expand(count, *value.shape[1:]) for name, value in embeds.items()}
        return torch.randn(count, *model.latent_shape), torch.full((count,), 500.0), conditioning

    sampling, training = inputs(rows), inputs(arguments.train_batch_size)
    pictures = model.decode(torch.randn(rows, *model.latent_shape)).cpu().numpy()
    words = iter(range(10**6))
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
            "encode": timed(lambda: model.encode_prompts([f"animal {next(words)}"])),
        }
    found["training"] = timed(backward) / arguments.train_batch_size
    found["reward"] = timed(lambda: evaluate_reward(reward, pictures, ["a cat"] * rows, [{}] * rows)) / rows
    found["update"] = timed(update)
    processes.gather_objects(None)
    found["exchange"] = timed(lambda: processes.sum(small))
    whole = timed(lambda: processes.sum(gradients))
    found["byte"] = max(0.0, whole - found["exchange"]) / gradients.nbytes
    everybody = processes.gather_objects(found)
    if processes.is_main:
        means = {name: float(np.mean([one[name] for one in everybody])) for name in found}
        output.write_text(json.dumps(means | {"exchanged": gradients.nbytes}))
    processes.leave()


def constants_of(arguments: Arguments, processes: int) -> Constants:
    """Measure the constants in `processes` processes at once."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "constants.json"
        launch([__file__, WORKER, as_json(arguments), str(output)], processes)
        return Constants(**json.loads(output.read_text()))


def iteration_of(arguments: Arguments) -> Iteration:
    """Return the work of the benchmark's iteration, whose prompts have been encoded in earlier ones."""
    from agents.planning.plan import denoiser_rows
    from ddpo_env.models.outline import outline_model

    config = configuration(arguments, Path("unused"))
    rows = denoiser_rows(config)
    outline = outline_model(arguments.model)
    assert outline is not None
    latent = 1
    for side in outline.latent_shape:
        latent *= side
    pictures = arguments.samples
    return Iteration(
        pictures=pictures,
        sampled=rows.sampling // config.iterations,
        trained=rows.training // config.iterations,
        again=rows.measuring // config.iterations,
        prompts=0,
        updates=arguments.updates,
        rollout=4 * latent * pictures * (arguments.num_inference_steps + 1),
    )


def check(arguments: Arguments, console: Console) -> dict[str, Any]:
    """Compare predicted and measured seconds of one process and of several."""
    work = iteration_of(arguments)
    counts = (1, arguments.processes)
    turns: dict[int, list[Turn]] = {count: [] for count in counts}
    for _ in range(arguments.repeats):  # in turns, so that a busy machine disturbs all alike
        for count in counts:
            predicted = predict(constants := constants_of(arguments, count), work, count)
            measured = arguments.samples / turn(arguments, count)["iteration"]
            turns[count].append(Turn(constants, predicted, measured))
        told = ", ".join(f"{count}: {turns[count][-1].ratio:.2f}" for count in counts)
        console.print(f"predicted over measured, by processes: {told}")
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
    """Constants, predicted seconds by what they are spent on, and measured seconds of an iteration."""

    constants: Constants
    predicted: dict[str, float]
    measured: float

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return sum(self.predicted.values()) / self.measured


def describe_turns(turns: list[Turn]) -> dict[str, Any]:
    """Return the turn whose ratio is the median, and all ratios."""
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
    """Measure, compare, print and write; or plan."""
    if sys.argv[1:2] == [WORKER]:
        measure(Arguments(**json.loads(sys.argv[2])), Path(sys.argv[3]))
        return 0
    console = Console()
    arguments = tyro.cli(Choices, description=__doc__)
    if arguments.plan:
        console.print(plan())
        return 0
    text = json.dumps(check(arguments, console), indent=2)
    console.print(text, highlight=False, soft_wrap=True)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
