"""What a configuration amounts to, in words and numbers, before anything starts."""

from __future__ import annotations

from agents.configuration import TrainConfig


def describe_plan(config: TrainConfig, processes: int = 1) -> list[str]:
    """Return the plan of a checked configuration, a line a subject; sizes are in samples, that is in pictures."""
    task, training = config.task, config.training
    total, steps = training.samples_per_iteration, task.num_inference_steps
    batches, groups = total // training.sample_batch_size, total // training.samples_per_prompt
    sampling = (
        f"sampling   {total} samples of {steps} steps an iteration: {_count(batches, 'batch', 'batches')} of "
        f"{training.sample_batch_size}, {_count(groups, 'prompt', 'prompts')} of {training.samples_per_prompt} samples"
    )
    updates = training.updates_per_iteration
    if training.algorithm.startswith("rwr"):
        chosen = (
            f"the best {100 - training.rwr_percentile:g} %" if training.algorithm == "rwr_sparse" else "all, weighted"
        )
        training_line = (
            f"training   {training.algorithm}: {_count(training.epochs, 'epoch', 'epochs')} of "
            f"{_count(updates, 'update', 'updates')} on the finished samples ({chosen}), in calls of up to "
            f"{min(training.train_batch_size, total)} samples"
        )
    else:
        trained = config.trained_steps
        training_line = (
            f"training   {training.algorithm}: {_count(training.epochs, 'epoch', 'epochs')} of "
            f"{_count(updates, 'update', 'updates')} of {total // updates} samples × {trained} of {steps} steps = "
            f"{total // updates * trained} pairs, in calls of up to {training.train_batch_size} pairs"
        )
    queries = config.iterations * total
    whole = (
        f"in all     {config.iterations} iterations, {queries:,} reward queries, "
        f"{config.iterations * training.epochs * updates:,} updates at most"
    )
    shared = [f"processes  {processes}, which share every batch"] if processes > 1 else []
    return [*_reward(config), *shared, sampling, training_line, whole]


def _reward(config: TrainConfig) -> list[str]:
    """What is worth saying of the reward: its options, and that samples without a score are dropped."""
    said = list(config.task.reward_options)
    if config.training.non_finite_rewards == "drop":
        said.append("samples whose score is NaN or infinite are dropped")
    return [f"reward     {config.task.reward}: {', '.join(said)}"] if said else []


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
