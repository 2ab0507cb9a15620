"""Checks of an iteration's update: gradients, their signal at each timestep, the ratio, how far the policy moves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from agents.algorithms.on_policy import TensorOnPolicyAlgorithm
from agents.commands.doctor.examination import Examination
from agents.commands.doctor.finding import Finding, graded
from agents.commands.doctor.machine import learning_names
from agents.rollout.buffer import Transitions

_UNUSED = 0.01
"""Fraction of the tensors that may stay unused: the last block of SD 3 throws its text tokens away."""
_ROWS = 8
"""Transitions whose gradient is looked at."""
_GROUPS, _MOST_TIMESTEPS, _MOST_SAMPLES = 4, 10, 16
STIRRED = 0.02
"""Standard deviation of the noise on adapters, whose second half is zero at the start and hides the first one."""
_LEAST_SNR = 0.01
"""Assumed of every timestep: the estimate from few samples is often 0."""
_CLEARLY_BETTER, _ENOUGH_SAMPLES = 4.0, 16


def check_gradient(examination: Examination) -> Finding:
    """Look for weights without a gradient, for NaN, and for terms of the loss without a gradient."""
    name, algorithm = "gradient", examination.rollout
    policy, names = examination.policy, learning_names(examination)
    named = dict(policy.denoiser.named_parameters())
    policy.set_training_mode(True)
    with stirred(examination):
        batch = _on_policy(algorithm)
        missing_terms = _terms_without_gradient(examination, batch)
        policy.optimizer.zero_grad()
        algorithm.loss(batch)[0].backward()
        gradients = {one: named[one].grad for one in names}
    policy.optimizer.zero_grad()
    broken = [one for one, grad in gradients.items() if grad is not None and not bool(grad.isfinite().all())]
    without = [one for one, grad in gradients.items() if grad is None or not bool(grad.any())]
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in gradients.values() if grad is not None))
    numbers = {"tensors": len(names), "norm": norm, "not_finite": broken, "without_gradient": without}
    numbers |= {"terms_without_gradient": missing_terms}
    if broken:
        advice = "Train in float32 or bfloat16, or lower --clip-range."
        return Finding(name, "red", numbers, f"{len(broken)} of {len(names)} gradients are not finite.", advice)
    if len(without) == len(names) or missing_terms:
        what = "The loss" if not missing_terms else f"The term {', '.join(missing_terms)}"
        advice = "predict must not detach its output or run without gradients."
        return Finding(name, "red", numbers, f"{what} has no gradient.", advice)
    if without:
        meaning = f"{len(without)} of {len(names)} tensors get no gradient and never learn, such as {without[0]}."
        if len(without) <= _UNUSED * len(names):
            return Finding(name, "green", numbers, f"{meaning} The others get one.")
        advice = "Choose --lora-targets whose layers the denoiser uses, or leave them as they are."
        return Finding(name, "amber", numbers, meaning, advice)
    return Finding(name, "green", numbers, f"All {len(names)} tensors get a finite gradient.")


@contextmanager
def stirred(examination: Examination) -> Iterator[None]:
    """Move what learns a little inside this context, as training will.

    Fresh adapters are the identity, and so are layers that begin at zero: the layers before them get no gradient yet.
    """
    policy = examination.policy
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    frozen = {name: value.clone() for name, value in _adapters(examination) if not value.requires_grad}
    generator = torch.Generator().manual_seed(examination.config.seed)
    with torch.no_grad():
        for _, weight in _adapters(examination) if policy.options.lora_rank else policy.denoiser.named_parameters():
            size = STIRRED if policy.options.lora_rank else STIRRED / 10 * (STIRRED + float(weight.std(correction=0)))
            weight.add_(size * torch.randn(weight.shape, generator=generator).to(weight))
    try:
        yield
    finally:
        policy.load_state_dict(before)
        with torch.no_grad():
            for name, weight in _adapters(examination):
                if name in frozen:
                    weight.copy_(frozen[name])


def _adapters(examination: Examination) -> list[tuple[str, nn.Parameter]]:
    """Return the second halves of the adapters, by name; those of a fresh LoRA are zero."""
    return [one for one in examination.policy.denoiser.named_parameters() if ".lora_B." in one[0]]


def _on_policy(algorithm: TensorOnPolicyAlgorithm) -> Transitions:
    """Return transitions with weight 1 whose log-probabilities are those of the policy as it is now."""
    is_ratio = algorithm.compares_with_sampling
    chosen = algorithm.random_steps(_ROWS) if is_ratio else algorithm.select_steps()[:_ROWS]
    if not len(chosen):
        raise ValueError(f"{type(algorithm).__name__} has nothing to train on: the samples have the same reward")
    batch = algorithm.transitions(chosen)
    with torch.no_grad():
        log_probs = algorithm.evaluate(batch, with_reference=False).log_prob
    return replace(batch, log_probs=log_probs, advantages=torch.ones_like(batch.advantages))


def _terms_without_gradient(examination: Examination, batch: Transitions) -> list[str]:
    """Return the names of the terms of the loss, beside the policy's, that no weight has an influence on."""
    algorithm, policy = examination.algorithm, examination.policy
    terms: dict[str, Tensor] = {}
    if algorithm.options.kl_coef and algorithm.compares_with_sampling:
        terms["kl_coef"] = policy.evaluate_with_reference(batch.observations, batch.actions)[3].mean()
    if policy.critic is not None:
        terms["critic"] = policy.predict_values(batch.observations).mean()
    missing = []
    for name, term in terms.items():
        policy.optimizer.zero_grad()
        if term.requires_grad:
            term.backward()
        gradients = [weight.grad for weight in policy.trainable_parameters() if weight.grad is not None]
        if not any(bool(gradient.any()) for gradient in gradients):
            missing.append(name)
    return missing


class _Timestep(NamedTuple):
    """The policy gradient of one step of the trajectory: signal and noise are squared norms."""

    step: int
    timestep: float
    norm: float
    signal: float
    noise: float


def check_timesteps(examination: Examination) -> Finding:
    """Measure signal and noise of the policy gradient at timesteps, and find the window with the most of the signal."""
    name, algorithm, config = "timesteps", examination.rollout, examination.config
    if not algorithm.compares_with_sampling:
        return Finding(name, "green", {}, f"{config.algorithm} does not train on single timesteps.")
    if config.update.noise_window is not None:
        return Finding(name, "green", {}, "The steps with noise move (noise_window): timesteps are not compared.")
    rows = _timestep_gradients(examination)
    if not any(row.norm for row in rows):
        meaning = "The policy gradient is 0 at every timestep: all advantages are 0."
        return Finding(name, "amber", {}, meaning, "Look at the reward's finding.")
    steps, configured = config.num_inference_steps, config.update.timestep_window
    inside = [row for row in rows if configured[0] * steps <= row.step + 0.5 <= configured[1] * steps] or rows
    best = max(_windows(rows), key=_gain)
    window = (round(best[0].step / steps, 3), 1.0 if best[-1] is rows[-1] else round((best[-1].step + 1) / steps, 3))
    improvement = _gain(best) / max(_gain(inside), 1e-30)
    numbers: dict[str, Any] = {
        "by_timestep": [
            {"timestep": row.timestep, "gradient_norm": row.norm, "snr": row.signal / max(row.noise, 1e-30)}
            for row in rows
        ],
        "configured_window": list(configured),
        "best_window": list(window),
        "improvement": improvement,
    }
    largest = max(rows, key=lambda row: row.norm)
    meaning = (
        f"Gradients are largest at t={largest.timestep:.0f} and the best window is {window[0]:g} to {window[1]:g}, "
        f"with {improvement:.2g} times the signal to noise of {configured[0]:g} to {configured[1]:g} "
        f"({min(_MOST_SAMPLES, len(algorithm.rollout_buffer.contexts))} samples: a rough estimate)."
    )
    if improvement > _CLEARLY_BETTER and len(algorithm.rollout_buffer.contexts) >= _ENOUGH_SAMPLES:
        advice = f"Try --timestep-window {window[0]:g} {window[1]:g}."
        return Finding(name, "amber", numbers, meaning, advice, {"timestep_window": window})
    return Finding(name, "green", numbers, meaning)


def _windows(rows: list[_Timestep]) -> Iterator[list[_Timestep]]:
    """Yield the contiguous parts with at least half of the timesteps."""
    least = math.ceil(len(rows) / 2)
    for start in range(len(rows) - least + 1):
        for stop in range(start + least, len(rows) + 1):
            yield rows[start:stop]


def _gain(rows: list[_Timestep]) -> float:
    """Return the squared signal-to-noise ratio of the sum of these steps' gradients, whose signals agree."""
    return sum(math.sqrt(row.signal) for row in rows) ** 2 / max(sum(row.noise for row in rows), 1e-30)


def _timestep_gradients(examination: Examination) -> list[_Timestep]:
    algorithm, policy = examination.rollout, examination.policy
    rollout, length = algorithm.rollout_buffer, examination.config.num_inference_steps
    kept = rollout.kept_steps()
    kept = kept[rollout.scored.ravel()[kept]]
    position = kept // rollout.n_envs % length
    steps = np.unique(position)
    learning = [weight for weight in policy.trainable_parameters() if weight.requires_grad]
    policy.set_training_mode(True)
    rows = []
    chosen = {round(one) for one in np.linspace(0, len(steps) - 1, min(len(steps), _MOST_TIMESTEPS))}
    for step in steps[sorted(chosen)].tolist():
        indices = kept[position == step][:_MOST_SAMPLES]
        groups = [group for group in np.array_split(indices, min(_GROUPS, len(indices))) if len(group)]
        total, squares = [torch.zeros_like(weight) for weight in learning], 0.0
        for group in groups:
            policy.optimizer.zero_grad()
            batch = rollout[group]
            log_prob = policy.evaluate_actions(batch.observations, batch.actions)[1]
            (batch.advantages * log_prob).mean().backward()
            for whole, weight in zip(total, learning, strict=True):
                if weight.grad is not None:
                    whole += weight.grad
                    squares += float(weight.grad.square().sum())
        count, whole_square = len(groups), sum(float(one.square().sum()) for one in total)
        # Products of different groups' gradients have no noise on average.
        signal = max(0.0, (whole_square - squares) / (count * (count - 1))) if count > 1 else 0.0
        noise = max(squares / count - signal, 0.0)
        signal = max(signal, _LEAST_SNR * noise)
        timestep = float(policy.sampler.timesteps[step])
        rows.append(_Timestep(step, timestep, math.sqrt(squares / count), signal, noise))
    policy.optimizer.zero_grad()
    return rows


def check_ratio(examination: Examination) -> Finding:
    """Read `|ratio − 1|` of the first update, whose policy is the one that sampled."""
    name, update = "ratio", examination.update
    if "train/ratio_deviation" not in update.metrics:
        why = update.error or f"the loss of {examination.config.algorithm} has no ratio"
        return Finding(name, "amber" if update.error else "green", {}, f"Not measured: {why}.")
    deviation, clip = update.metrics["train/ratio_deviation"], examination.config.training.clip_range
    level = graded(deviation, 0.1 * clip, clip)
    numbers = {"deviation": deviation, "clip_range": clip, "recomputed": examination.algorithm.recomputes_log_probs}
    meaning = f"Before the first update the ratio is 1 within {deviation:.1g} (clip range {clip:g})."
    advice = (
        "The policy that trains is not the one that sampled. Look for dropout and other layers that differ in training "
        "mode, or add --recompute-log-probs True in half precision."
    )
    return Finding(name, level, numbers, meaning, "" if level == "green" else advice)


def check_update(examination: Examination) -> Finding:
    """Count the optimizer's steps, and compare how far the policy moved with what the clip range allows."""
    name, update, config = "update", examination.update, examination.config
    training = config.training
    expected = training.epochs * training.updates_per_iteration
    clip, rate = training.clip_range, config.learning_rate
    assert rate is not None
    metrics = {key.removeprefix("train/"): value for key, value in update.metrics.items() if key.startswith("train/")}
    kl = metrics.get("kl_to_sampling", math.nan)
    numbers: dict[str, Any] = {"optimizer_steps": update.steps, "expected_steps": expected, "learning_rate": rate}
    numbers |= {"largest_change_of_a_weight": update.largest_change, **metrics}
    if update.error:
        lower = rate / 100
        settings = {"learning_rate": lower}
        return Finding(name, "red", numbers, f"The update failed: {update.error}.", f"Try {lower:g}.", settings)
    if update.largest_change == 0:
        meaning = f"No weight changed in {update.steps} steps."
        return Finding(name, "red", numbers, meaning, "The learning rate is 0, or every gradient is: look above.")
    if update.steps != expected and config.update.target_kl is None:
        meaning = f"The optimizer took {update.steps} steps, not epochs × updates_per_iteration = {expected}."
        return Finding(name, "red", numbers, meaning, "Compare the algorithm's batch_size and n_epochs.")
    if not config.traits.has_ratio:
        return _report_kl(name, numbers, kl, rate)
    return _judge_kl(name, numbers, kl, clip, rate)


def _report_kl(name: str, numbers: dict[str, Any], kl: float, rate: float) -> Finding:
    """Report the KL divergence of an iteration of an algorithm without a ratio: no clip range says what is large."""
    steps = numbers["optimizer_steps"]
    took = f"{steps} {'step' if steps == 1 else 'steps'}"
    norm = f"gradient norm {numbers.get('grad_norm', math.nan):.2g}."
    if "kl_to_sampling" not in numbers:  # no step has noise
        return Finding(name, "green", numbers, f"{took} moved the policy; its KL is not measured; {norm}")
    meaning = f"{took} moved the policy by KL {kl:.1g} nats; {norm}"
    if not math.isfinite(kl):
        lower = rate / 100
        advice = f"The learning rate is far too large: try {lower:g}."
        return Finding(name, "red", numbers, meaning, advice, {"learning_rate": lower})
    return Finding(name, "green", numbers, meaning)


_LEAST_KL, _GOOD_KL, _MOST_KL, _BROKEN_KL = 1e-2, 10.0, 1e3, 1e5
"""Limits of an iteration's KL divergence. The unit is `clip_range² / 2`, the divergence at a log-ratio of `clip_range`.

The tuned default of the bundled model has about 30. The divergence grows with the square of the learning rate, so these
limits are a thirtieth of a good rate, ten times and a hundred times as much."""


def _judge_kl(name: str, numbers: dict[str, Any], kl: float, clip: float, rate: float) -> Finding:
    """Judge the KL divergence of an iteration. It grows with the square of the learning rate."""
    unit = clip**2 / 2
    ratio = kl / unit
    suggested = float(f"{rate * math.sqrt(_GOOD_KL / ratio):.1g}") if ratio > 0 and math.isfinite(ratio) else rate
    numbers |= {"kl_in_clip_ranges": ratio, "suggested_learning_rate": suggested}
    steps = numbers["optimizer_steps"]
    norm = numbers.get("grad_norm", math.nan)
    meaning = (
        f"{steps} {'step' if steps == 1 else 'steps'} moved the policy by KL {kl:.1g}, {ratio:.2g} × clip_range²/2; "
        f"gradient norm {norm:.2g}."
    )
    if not math.isfinite(ratio) or ratio > _BROKEN_KL:
        advice = f"The learning rate is far too large: try {suggested:g}, after the window of timesteps is right."
        return Finding(name, "red", numbers, meaning, advice, {"learning_rate": suggested})
    if not _LEAST_KL <= ratio <= _MOST_KL:
        size = "large" if ratio > _MOST_KL else "small"
        advice = f"The learning rate is {size}: try {suggested:g}, after the window of timesteps is right."
        return Finding(name, "amber", numbers, meaning, advice, {"learning_rate": suggested})
    return Finding(name, "green", numbers, meaning)
