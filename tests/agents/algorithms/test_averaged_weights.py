"""The exponential moving average of what learns, against its recurrence; evaluated and saved in its place."""

import pytest
import torch
from helpers.algorithms import collected, denoising_ppo
from helpers.micro_agents import STEPS, micro_config, weights
from safetensors.torch import load_file

from agents import DiffusionPolicy
from agents.training.preparation import run_training


def flat(policy):
    return torch.cat([value.flatten() for value in weights(policy).values()])


def test_average_follows_its_recurrence_and_leaves_the_weights_alone(micro_pipeline_folder):
    model = denoising_ppo(micro_pipeline_folder, ema_decay=0.6, batch_size=6)
    seen = []
    step = model.policy.optimizer.step
    model.policy.optimizer.step = lambda *args, **kwargs: (step(*args, **kwargs), seen.append(flat(model.policy)))[0]
    collected(model).train()
    assert len(seen) == STEPS
    # diffusers' warm-up: the k-th update's decay is min(decay, (1 + k) / (10 + k)), and the first just copies
    expected = seen[0]
    for update, value in enumerate(seen[1:], 1):
        decay = min(0.6, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * value
    with model.averaged_weights():
        torch.testing.assert_close(flat(model.policy), expected)
    assert torch.equal(flat(model.policy), seen[-1])
    assert not torch.allclose(expected, seen[-1], atol=1e-4)


def test_weights_come_back_after_an_error(micro_pipeline_folder):
    model = denoising_ppo(micro_pipeline_folder, ema_decay=0.9, batch_size=6)
    collected(model).train()
    before = flat(model.policy)
    with pytest.raises(KeyboardInterrupt), model.averaged_weights():
        raise KeyboardInterrupt
    assert torch.equal(flat(model.policy), before)


def test_without_an_average_nothing_is_swapped(micro_pipeline_folder):
    model = collected(denoising_ppo(micro_pipeline_folder))
    before = flat(model.policy)
    with model.averaged_weights():
        assert torch.equal(flat(model.policy), before)


def test_run_saves_the_average_and_resumes_both(micro_pipeline_folder, tmp_path):
    short = {"iterations": 2, "eval_interval": 0, "eval_samples": 2}
    run_training(micro_config(micro_pipeline_folder, tmp_path / "run", ema_decay=0.9, **short))
    checkpoint = load_file(tmp_path / "run/checkpoints/iteration_000002/tensors.safetensors")
    learned = [checkpoint[name] for name in checkpoint if name.startswith("policy.")]
    averages = [checkpoint[name] for name in checkpoint if name.startswith("average.")]
    assert len(averages) == len(learned) > 0
    saved = DiffusionPolicy.load(tmp_path / "run/policy", device="cpu")
    saved_values = sorted(float(value.sum()) for value in saved.state_dict().values())
    assert saved_values == pytest.approx(sorted(float(value.sum()) for value in averages), abs=1e-6)
    assert saved_values != pytest.approx(sorted(float(value.sum()) for value in learned), abs=1e-6)
