"""Faults planted in what trains: adapters, gradients, the learning rate, the optimizer's steps, memory, the disk."""

import shutil
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from helpers.patients import Patient, finding_of, findings_of
from peft.tuners.lora import LoraLayer

from agents.algorithms import on_policy
from agents.commands.doctor import speed
from agents.config.algorithms import ALGORITHMS
from agents.config.train_config import train_config
from agents.policy import diffusion_policy
from agents.training import build


def change_adapter(monkeypatch, change):
    """Change the first adapter of every policy that is made."""
    add = diffusion_policy.add_lora

    def add_and_change(*arguments):
        denoiser = add(*arguments)
        change(next(layer for layer in denoiser.modules() if isinstance(layer, LoraLayer)))
        return denoiser

    monkeypatch.setattr(diffusion_policy, "add_lora", add_and_change)


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_frozen_adapter(half, tmp_path, monkeypatch):
    change_adapter(monkeypatch, lambda layer: getattr(layer, half).requires_grad_(False))
    finding = finding_of(Patient(), tmp_path, "weights that learn")
    assert finding.level == "red"
    assert "1 of 114 tensors do not learn" in finding.meaning
    (frozen,) = finding.numbers["frozen"]
    assert half in frozen


def test_adapter_that_the_optimizer_does_not_know(tmp_path, monkeypatch):
    right = diffusion_policy.DiffusionPolicy.trainable_parameters
    monkeypatch.setattr(diffusion_policy.DiffusionPolicy, "trainable_parameters", lambda self: right(self)[1:])
    finding = finding_of(Patient(), tmp_path, "weights that learn")
    assert finding.level == "red"
    assert len(finding.numbers["unknown_to_optimizer"]) == 1


def test_adapter_without_a_gradient(tmp_path, monkeypatch):
    change_adapter(monkeypatch, lambda layer: setattr(layer, "forward", layer.base_layer.forward))
    finding = finding_of(Patient(), tmp_path, "gradient")
    assert finding.level == "amber"
    assert "2 of 114 tensors get no gradient" in finding.meaning


def test_loss_without_a_gradient(tmp_path):
    class Faulty(Patient):
        def predict(self, denoiser, latents, timestep, conditioning):
            output = super().predict(denoiser, latents, timestep, conditioning)
            return output.detach() + 0 * output

    finding = finding_of(Faulty(), tmp_path, "gradient")
    assert finding.level == "red"
    assert "has no gradient" in finding.meaning


def test_gradient_that_is_not_finite(tmp_path):
    class Faulty(Patient):
        def predict(self, denoiser, latents, timestep, conditioning):
            output = super().predict(denoiser, latents, timestep, conditioning)
            return output + (output - output).abs().sqrt()  # 0, with an infinite slope

    finding = finding_of(Faulty(), tmp_path, "gradient")
    assert finding.level == "red"
    assert "not finite" in finding.meaning


def test_kl_penalty_without_a_gradient(tmp_path, monkeypatch):
    right = diffusion_policy.DiffusionPolicy.evaluate_with_reference

    def detached(self, obs, actions):
        *others, kl = right(self, obs, actions)
        return *others, kl.detach()

    assert finding_of(Patient(), tmp_path, "gradient", kl_coef=0.1).level == "green"
    monkeypatch.setattr(diffusion_policy.DiffusionPolicy, "evaluate_with_reference", detached)
    finding = finding_of(Patient(), tmp_path, "gradient", kl_coef=0.1)
    assert finding.level == "red"
    assert "kl_coef" in finding.meaning


def test_dropout_in_training_mode(tmp_path):
    faulty = Patient()
    for layer in faulty.denoiser.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.3
    findings = findings_of(faulty, tmp_path, "denoiser", "ratio")
    assert findings["denoiser"].level == "green"
    assert findings["ratio"].level == "red"
    assert "dropout" in findings["ratio"].advice


def test_log_probabilities_of_other_latents(tmp_path, monkeypatch):
    sample = diffusion_policy.DenoisingDistribution.log_prob

    def of_rounded(self, actions):
        scored = actions if torch.is_grad_enabled() else actions.bfloat16().float()
        return sample(self, scored)

    monkeypatch.setattr(diffusion_policy.DenoisingDistribution, "log_prob", of_rounded)
    assert finding_of(Patient(), tmp_path, "ratio", clip_range=1e-6).level == "red"


def test_learning_rate_of_zero(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_learning_rate", lambda config: 0.0)
    finding = finding_of(Patient(), tmp_path, "update")
    assert finding.level == "red"
    assert "No weight changed in 2 steps" in finding.meaning


def test_learning_rate_that_is_much_too_large(tmp_path):
    finding = finding_of(Patient(), tmp_path, "update", learning_rate=1.0)
    assert finding.level == "red"
    assert 0 < finding.settings["learning_rate"] < 0.1
    again = finding_of(Patient(), tmp_path, "update", learning_rate=finding.settings["learning_rate"])
    assert again.level != "red"


def test_learning_rate_that_is_small(tmp_path):
    finding = finding_of(Patient(), tmp_path, "update", learning_rate=1e-7)
    assert finding.level == "amber"
    assert "small" in finding.advice
    assert finding.settings["learning_rate"] > 1e-5


def test_wrong_number_of_optimizer_steps(tmp_path, monkeypatch):
    right = on_policy.TensorOnPolicyAlgorithm._batches
    monkeypatch.setattr(on_policy.TensorOnPolicyAlgorithm, "_batches", lambda *arguments: right(*arguments)[:1])
    finding = finding_of(Patient(), tmp_path, "update")
    assert finding.level == "red"
    assert "took 1 steps, not epochs × updates_per_iteration = 2" in finding.meaning


def test_memory_that_does_not_suffice(tmp_path, monkeypatch):
    right = diffusion_policy.DiffusionPolicy.evaluate_actions

    def limited(self, obs, actions):
        if len(actions) > 4 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return right(self, obs, actions)

    monkeypatch.setattr(diffusion_policy.DiffusionPolicy, "evaluate_actions", limited)
    finding = finding_of(Patient(), tmp_path, "speed and memory", train_batch_size=10)
    assert finding.level == "red"
    assert "training with batches of 8 (of 4 it does)" in finding.meaning
    assert finding.settings == {"train_batch_size": 4}


@pytest.mark.parametrize(("free", "level"), [(10**7, "red"), (10**9, "amber"), (10**11, "green")])
def test_disk_that_is_nearly_full(free, level, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - free, free))
    finding = finding_of(Patient(), tmp_path, "disk")
    assert finding.level == level
    assert "are free" in finding.meaning


def test_dtype_in_which_the_device_is_slow(tmp_path):
    finding = finding_of(Patient(), tmp_path, "machine", dtype="bfloat16")
    assert finding.level == "amber"
    assert finding.settings == {"dtype": "float32"}


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "ppo"])
def test_other_algorithms_are_healthy(algorithm, tmp_path):
    settings = {"updates_per_iteration": 1, "epochs": 1 if algorithm == "reinforce" else 2}
    findings = findings_of(
        Patient(), tmp_path, "gradient", "timesteps", "ratio", "update", **settings, algorithm=algorithm
    )
    assert {name: one.meaning for name, one in findings.items() if one.level == "red"} == {}
    update = findings["update"]
    assert update.numbers["optimizer_steps"] == settings["epochs"]
    has_clip = algorithm == "grpo"  # the others refuse a clip range, so it is no unit of theirs
    assert ("clip_range" in update.meaning) == ("kl_in_clip_ranges" in update.numbers) == has_clip
    assert update.level == "green" or has_clip


def test_update_without_a_measured_divergence_is_healthy(tmp_path):
    finding = finding_of(Patient(), tmp_path, "update", algorithm="nft", eta=0.0, updates_per_iteration=1)
    assert (finding.level, "its KL is not measured" in finding.meaning) == ("green", True)


def test_layers_before_one_that_begins_at_zero_get_a_gradient(tmp_path):
    settings = {"reward": "points_ring", "lora_rank": 0, "guidance_scale": 1.0}
    findings = findings_of("points", tmp_path, "gradient", "parity", **settings)
    assert {finding.level for finding in findings.values()} == {"green"}
    assert "no pipeline" in findings["parity"].meaning


def test_every_weight_learns_without_a_lora(tmp_path):
    findings = findings_of(
        Patient(), tmp_path, "weights that learn", "gradient", "LoRA", lora_rank=0, learning_rate=1e-5
    )
    assert findings["weights that learn"].level == "green"
    assert findings["gradient"].level != "red"
    assert "there is no LoRA" in findings["LoRA"].meaning


@pytest.mark.parametrize(("algorithm", "trained"), [("rwr", 12 * 5 * 72), ("nft", 12 * 72 * 5)])
def test_time_of_the_plan_counts_guided_latents_as_the_rates_do(algorithm, trained, monkeypatch):
    monkeypatch.setattr(speed, "_seconds_per_sample", lambda _: (0.0, 0.0))
    examination = SimpleNamespace(
        config=train_config(algorithm=algorithm, guidance_scale=3.0).resolved(),
        once=lambda *_: speed.Rates({1: 1.0}, {1: 1.0}, {}, {}),
        samples=SimpleNamespace(decoded=[]),
        policy=SimpleNamespace(sampler=range(10)),
    )
    assert speed.check_plan(examination).numbers["training_hours"] == pytest.approx(trained / 3600, abs=1e-4)
