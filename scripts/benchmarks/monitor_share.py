"""Measure how much of a run its monitors take: after an update, and on the held-out samples of an evaluation.

    python scripts/benchmarks/monitor_share.py                                      # the default run
    python scripts/benchmarks/monitor_share.py --samples 4 --num-inference-steps 4  # iterations of 16 transitions

It trains as `scripts/train_ppo.py` does and evaluates after every iteration. The time is the processor time of this
process, which other programs on the machine change little. An iteration is its sampling, its update and its drift,
without the evaluation. Drift is what is measured after an update: how far the policy has moved. The monitors are the
calls of the denoiser that compare the policy with the pretrained one in an evaluation, and the measures of the samples.
A run with `--eval-interval 5` has them after every fifth iteration only.
"""

import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any
from unittest import mock

import torch
import tyro

from agents import DiffusionPolicy, Run, prepare_run, train_config
from agents.evaluation import evaluate
from agents.training.monitoring.held_out_images import HeldOutImages
from agents.training.monitoring.monitors import Monitors


@dataclass(kw_only=True)
class Arguments:
    """The run; the defaults are those of train_ppo.py."""

    model: str = "tiny"
    """Bundled name, sd14-random (Stable Diffusion 1.4 with random weights), a folder, or a Hub id."""
    resolution: int | None = None
    """Side of the images in pixels. Default: the model's own."""
    samples: int = 72
    """Images per iteration."""
    num_inference_steps: int = 10
    """Denoising steps."""
    eval_samples: int = 90
    """Held-out images of an evaluation."""
    iterations: int = 4
    """Timed iterations."""
    threads: int = torch.get_num_threads()
    """CPU threads."""


class Clock:
    """Adds up the processor seconds of calls by name."""

    def __init__(self) -> None:
        """Begin at 0."""
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return the call, whose time is noted."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[name].append(time.process_time() - began)

        return wrapped


def measure(arguments: Arguments, folder: Path) -> dict[str, float]:
    """Return the processor seconds of an iteration, of the drift in it, of an evaluation, and of the monitors in one.

    Those of an iteration and of its drift are means, because drift is not measured in every small iteration.
    """
    clock = Clock()
    run: Run = prepare_run(
        train_config(
            model=arguments.model,
            resolution=arguments.resolution,
            samples_per_iteration=arguments.samples,
            num_inference_steps=arguments.num_inference_steps,
            eval_samples=arguments.eval_samples,
            eval_interval=1,
            iterations=arguments.iterations,
            run_dir=folder / "run",
            device="cpu",
        )
    )
    assert isinstance(run.algorithm.policy, DiffusionPolicy)
    with (
        mock.patch.object(type(run.algorithm), "iterate", clock.timed("iteration", type(run.algorithm).iterate)),
        mock.patch.object(type(run.algorithm), "drift", clock.timed("drift", type(run.algorithm).drift)),
        mock.patch.object(HeldOutImages, "_evaluate", clock.timed("evaluation", HeldOutImages._evaluate)),
        mock.patch.object(Monitors, "on_evaluation", clock.timed("measures", Monitors.on_evaluation)),
        mock.patch.object(
            evaluate,
            "compare_with_pretrained",
            clock.timed("comparison", evaluate.compare_with_pretrained),
        ),
    ):
        run.train()
    evaluations = len(clock.seconds["evaluation"])
    monitors = median(clock.seconds["measures"]) + sum(clock.seconds["comparison"]) / evaluations
    return {
        "iteration": mean(clock.seconds["iteration"]),
        "drift": sum(clock.seconds["drift"]) / len(clock.seconds["iteration"]),
        "evaluation": median(clock.seconds["evaluation"]),
        "monitors": monitors,
    }


def main() -> int:
    """Measure and print."""
    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(arguments.threads)
    try:
        with tempfile.TemporaryDirectory() as folder:
            seconds = measure(arguments, Path(folder))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, value in seconds.items():
        print(f"{name:<11}{value:8.3f} s of processor time")
    whole = seconds["iteration"] + seconds["evaluation"]
    print(f"drift / iteration                                    {seconds['drift'] / seconds['iteration']:.2%}")
    print(f"monitors / evaluation                                {seconds['monitors'] / seconds['evaluation']:.2%}")
    print(f"monitors / (iteration + evaluation)                  {seconds['monitors'] / whole:.2%}")
    five = 5 * seconds["iteration"] + seconds["evaluation"]
    watching = 5 * seconds["drift"] + seconds["monitors"]
    print(f"monitors / (5 iterations + evaluation), the default  {seconds['monitors'] / five:.2%}")
    print(f"drift and monitors / (5 iterations + evaluation)     {watching / five:.2%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
