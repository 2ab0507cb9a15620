"""What a slow reward costs: iterations whose reward sleeps as long as sampling a batch takes, against an instant one.

Both kinds of iteration take turns in one process. With `--no-overlap` the reward is waited for, for comparison.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from stable_baselines3.common.logger import Logger

DELAY = {"seconds": 0.0}
"""How long the reward takes, beside its arithmetic."""


@dataclass
class Arguments:
    """One iteration: batches of pictures are sampled, then trained on."""

    samples: int = 72
    """Pictures in an iteration."""
    batches: int = 12
    """Batches in which they are sampled; the last batch's rewards are always waited for."""
    repeats: int = 5
    """Iterations of each kind."""
    overlap: bool = True
    """Whether rewards are computed while the next batch is being sampled."""
    model: str = "tiny"
    """The model."""


def slow_brightness(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
    """Sleep, as one who waits for a server, and return the mean pixels."""
    import benchmark_overlap  # not __main__, of which there is a second copy

    time.sleep(benchmark_overlap.DELAY["seconds"])
    return images.mean(axis=(1, 2, 3)) / 255


def main() -> None:
    """Time and print."""
    arguments = tyro.cli(Arguments, description=__doc__)
    import benchmark_overlap

    from agents.config.settings import RunSettings, TaskSettings, TrainingSettings
    from agents.config.train_config import TrainConfig
    from agents.training.run import build_run

    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            run=RunSettings(run_dir=Path(folder) / "run", eval_samples=1, iterations=1),
            task=TaskSettings(model=arguments.model, reward="benchmark_overlap:slow_brightness"),
            training=TrainingSettings(
                samples_per_iteration=arguments.samples,
                sample_batch_size=arguments.samples // arguments.batches,
                overlap_rewards=arguments.overlap,
            ),
        )
        config.check()
        config.optimizer.learning_rate = 1e-5
        algorithm, pictures = build_run(config)
        algorithm.set_logger(Logger(None, []))
        _, callback = algorithm._setup_learn(1)
        assert algorithm.env is not None

        def iteration() -> tuple[float, float]:
            start = time.perf_counter()
            algorithm.collect_rollouts(algorithm.env, callback, algorithm.rollout_buffer, algorithm.n_steps)  # type: ignore[arg-type]
            middle = time.perf_counter()
            algorithm._update_current_progress_remaining(0, 1)
            algorithm.train()
            return middle - start, time.perf_counter() - start

        iteration()  # the first one warms up
        sampling = statistics.median(iteration()[0] for _ in range(3)) / arguments.batches
        ratios = []
        for _ in range(arguments.repeats):
            benchmark_overlap.DELAY["seconds"] = 0.0
            _, instant = iteration()
            benchmark_overlap.DELAY["seconds"] = sampling
            _, slow = iteration()
            ratios.append(slow / instant)
            print(
                f"instant {instant:.2f} s, slow ({sampling:.2f} s a batch) {slow:.2f} s: {slow / instant:.3f}",
                flush=True,
            )
        algorithm.env.close()
        pictures.env.close()
    print(
        f"\n{arguments.batches} batches of {arguments.samples // arguments.batches} pictures, "
        f"overlap {'on' if arguments.overlap else 'off'}: a reward as slow as sampling makes an iteration "
        f"{statistics.median(ratios):.3f} times as long (median of {arguments.repeats})"
    )


if __name__ == "__main__":
    main()
