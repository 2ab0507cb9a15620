"""The pretend accelerator does what torch documents for CUDA."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.pretend_accelerator import Accelerator, pretend_accelerator
from torch import Tensor, nn
from torch.nn import functional

pytestmark = pytest.mark.usefixtures("accelerator")
MIXED = "Expected all tensors to be on the same device"


def filled(*shape: int, device: str = "cuda") -> Tensor:
    return torch.arange(np.prod(shape), dtype=torch.float32).reshape(shape).to(device)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(2, device="cuda"),
        lambda: torch.tensor([1, 2], device=torch.device("cuda")),
        lambda: torch.as_tensor(np.ones(2), device="cuda:0"),
        lambda: torch.ones(2).to("cuda"),
        lambda: torch.ones(2).to(device="cuda", dtype=torch.float16),
        lambda: torch.ones(2).cuda(),
        lambda: torch.ones(2).to(torch.ones(1, device="cuda")),
        lambda: torch.ones(2, device="cuda").new_tensor([1.0]),
        lambda: torch.ones(2, device="cuda").new_zeros(3),
        lambda: torch.randn(2, device="cuda"),
        lambda: torch.ones(2, device="cuda") * 2,
        lambda: torch.empty_like(torch.ones(2, device="cuda")),
    ],
)
def test_tensors_report_the_device_on_which_they_were_made(make: Callable[[], Tensor]) -> None:
    made = make()
    assert made.device == torch.device("cuda:0")
    assert made.device.type == "cuda"
    assert made.is_cuda
    assert made.get_device() == 0
    assert not made.cpu().is_cuda


def test_default_device_of_a_context_is_the_accelerator() -> None:
    with torch.device("cuda:1"):
        assert torch.ones(2).device == torch.tensor([1.0]).device == torch.device("cuda:1")
        assert nn.Linear(2, 2).weight.device == torch.device("cuda:1")


def test_device_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.ones(2, device="cuda:2")


def test_moving_to_the_same_device_copies_nothing() -> None:
    values = filled(3)
    assert values.to("cuda") is values
    assert values.to("cuda:0", torch.float32) is values
    assert values.to("cuda", copy=True) is not values
    assert values.float() is values
    assert values.to("cuda:1").device == torch.device("cuda:1")


@pytest.mark.parametrize(
    "mix",
    [
        lambda host, device: host + device,
        lambda host, device: device.mul_(host),
        lambda host, device: device @ host.T,
        lambda host, device: torch.cat([host, device]),
        lambda host, device: torch.where(device > 1, host, device),
        lambda host, device: functional.linear(host, device),
        lambda host, device: functional.conv2d(host[None, None], device[None, None]),
        lambda host, device: device.index_copy(0, torch.tensor([0]), device[:1]),
        lambda host, device: device.to("cuda:1") + device,
        lambda host, device: host.sum().add_(device.sum()),
    ],
)
def test_tensors_of_two_devices_do_not_mix(mix: Callable[[Tensor, Tensor], Any]) -> None:
    with pytest.raises(RuntimeError, match=MIXED):
        mix(torch.ones(2, 2), torch.ones(2, 2, device="cuda"))


def test_numbers_and_scalars_of_the_host_do_mix() -> None:
    values = filled(2, 2)
    scalar = torch.tensor(2.0)
    for mixed in (values * 2, values * scalar, scalar - values, values.clone().add_(scalar), values[torch.tensor([1])]):
        assert mixed.device.type == "cuda"
    values[0] = scalar
    assert values[0].tolist() == [2.0, 2.0]
    with pytest.raises(RuntimeError, match=MIXED):
        values @ torch.ones(2)
    with pytest.raises(RuntimeError, match="indices should be either on cpu or on the same device"):
        _ = torch.ones(3)[torch.tensor([0], device="cuda")]


def test_array_of_a_tensor_on_the_device_is_refused() -> None:
    values = filled(2)
    for convert in (lambda: values.numpy(), lambda: np.asarray(values)):
        with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
            convert()
    np.testing.assert_array_equal(values.cpu().numpy(), [0, 1])
    np.testing.assert_array_equal(values.numpy(force=True), [0, 1])


@pytest.mark.parametrize(
    "wait",
    [
        lambda values: values.sum().item(),
        lambda values: float(values[0]),
        lambda values: bool(values.any()),
        lambda values: values.cpu(),
        lambda values: values.to("cpu"),
        lambda values: values.tolist(),
        lambda values: values.nonzero(),
        lambda values: values[values > 1],
        lambda values: torch.where(values > 1),
        lambda values: values.unique(),
        lambda values: torch.equal(values, values),
        lambda values: values.__setitem__(values > 1, torch.ones(2, device="cuda")),
        lambda values: torch.masked_select(values, values > 1),
        lambda values: torch.tensor([1.0], device="cuda"),
        lambda values: torch.as_tensor(np.ones(3), device="cuda"),
        lambda values: torch.ones(4).to("cuda"),
        lambda values: values.copy_(torch.ones(4)),
        lambda values: values[torch.tensor([0, 1])],
        lambda values: torch.ones(4).copy_(values),
        lambda values: values[[0, 1]],
        lambda values: values[np.array([0, 1])],
    ],
)
def test_reading_and_copying_make_the_host_wait(accelerator: Accelerator, wait: Callable[[Tensor], Any]) -> None:
    values = filled(4)
    with accelerator.counted_waits() as waits:
        wait(values)
    assert waits.total() >= 1
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        wait(values)


def test_computing_does_not_make_the_host_wait(accelerator: Accelerator) -> None:
    values, network = filled(4, 4), nn.Linear(4, 4).to("cuda")
    chosen = torch.tensor([0, 1], device="cuda")
    with accelerator.counted_waits() as waits:
        network(values + 1).sum().backward()
        _ = values[chosen] + values.sum() * torch.where(values > 1, values, 0.0).max()
        torch.full((2,), 3.0, device="cuda")
        torch.randn(3, device="cuda")
        torch.ones(4).to("cuda", non_blocking=True)
        values[0] = 3.0
        values.to("cuda:1")
        torch.cuda.synchronize()
    assert waits.total() == 0, waits
    torch.cuda.set_sync_debug_mode("warn")
    with pytest.warns(UserWarning, match="synchronizing"):
        values.tolist()


def test_copy_to_the_host_that_does_not_wait_is_garbage_until_the_host_waits() -> None:
    copied = filled(3).to("cpu", non_blocking=True)
    assert copied.tolist() != [0, 1, 2]
    torch.cuda.synchronize()
    assert copied.tolist() == [0, 1, 2]


def test_only_tensors_of_the_host_are_pinned() -> None:
    pinned = torch.ones(3).pin_memory()
    assert pinned.is_pinned()
    assert torch.empty(3, pin_memory=True).is_pinned()
    assert not torch.ones(3).is_pinned()
    assert pinned.to("cuda", non_blocking=True).tolist() == [1, 1, 1]
    with pytest.raises(RuntimeError, match="only dense CPU tensors can be pinned"):
        filled(3).pin_memory()


def test_generator_has_its_own_stream_and_a_state_of_16_bytes() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    assert isinstance(generator, torch.Generator)
    assert generator.device == torch.device("cuda:0")
    state = generator.get_state()
    assert state.device.type == "cpu"
    assert state.numel() == 16
    first = torch.randn(8, device="cuda", generator=generator)
    second = torch.randn(8, device="cuda", generator=generator)
    generator.set_state(state)
    torch.testing.assert_close(torch.randn(8, device="cuda", generator=generator), first, rtol=0, atol=0)
    assert not torch.equal(first, second)
    assert not torch.equal(first.cpu(), torch.randn(8, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(RuntimeError, match="RNG state is wrong size"):
        generator.set_state(torch.Generator().get_state())


def test_generator_of_the_other_device_is_refused() -> None:
    for draw in (
        lambda generator: torch.randn(2, device="cuda", generator=generator),
        lambda generator: torch.randint(0, 9, (2,), device="cuda", generator=generator),
        lambda generator: filled(2).normal_(generator=generator),
    ):
        with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
            draw(torch.Generator())
    with pytest.raises(RuntimeError, match="Expected a 'cpu' device type for generator but found 'cuda'"):
        torch.randn(2, generator=torch.Generator("cuda"))


def test_noise_of_the_host_can_be_asked_for() -> None:
    with pretend_accelerator(noise_of_host=True):
        drawn = [torch.Generator(device).manual_seed(5) for device in ("cpu", "cuda")]
        host, device = ([torch.randn(3, device=one.device, generator=one).tolist() for _ in range(2)] for one in drawn)
    assert host == device


def test_global_seed_seeds_the_host_and_every_device() -> None:
    def drawn() -> list[list[float]]:
        torch.manual_seed(3)
        return [torch.randn(4, device=device).tolist() for device in ("cpu", "cuda:0", "cuda:1")]

    first = drawn()
    assert drawn() == first
    assert first[0] != first[1]
    state = torch.cuda.get_rng_state("cuda:1")
    torch.get_rng_state()
    host = torch.get_rng_state()
    drawn_on_device = torch.rand(3, device="cuda:1")
    assert torch.equal(torch.get_rng_state(), host), "the device draws nothing from the host's generator"
    torch.cuda.set_rng_state(state, "cuda:1")
    torch.testing.assert_close(torch.rand(3, device="cuda:1"), drawn_on_device, rtol=0, atol=0)


def test_moved_module_keeps_its_parameters_and_computes_the_same() -> None:
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.SiLU())
    inputs = torch.randn(3, 2, 8, 8)
    expected = network(inputs).detach()
    weight, optimizer = network[0].weight, torch.optim.AdamW(network.parameters(), lr=0.1)
    network.to("cuda")
    assert network[0].weight is weight
    assert isinstance(weight, nn.Parameter)
    with pytest.raises(RuntimeError, match=MIXED):
        network(inputs)
    computed = network(inputs.to("cuda"))
    torch.testing.assert_close(computed.cpu(), expected, rtol=0, atol=0)
    computed.square().mean().backward()
    before = weight.detach().clone()
    optimizer.step()
    assert weight.grad is not None
    assert weight.grad.device == weight.device == torch.device("cuda:0")
    assert not torch.equal(weight, before)
    twin = copy.deepcopy(network)
    assert twin[0].weight.device.type == "cuda"
    assert twin[0].weight is not weight
    network.load_state_dict({name: value.cpu() for name, value in twin.state_dict().items()})
    network.cpu()
    assert network[0].weight is weight
    assert weight.device.type == "cpu"


def test_views_share_their_values() -> None:
    values = filled(2, 3)
    values[0].fill_(7)
    values.T.mul_(2)
    values.unsqueeze_(0)
    assert values.shape == (1, 2, 3)
    assert values.tolist() == [[[14, 14, 14], [6, 8, 10]]]
    values.data = torch.zeros(1, 2, 3, device="cuda")
    assert values.sum().item() == 0


def test_inference_mode_makes_views_of_weights() -> None:
    network = nn.Linear(4, 4).to("cuda")
    with torch.inference_mode():
        assert not network.weight[0].is_inference()
        assert torch.ones(2).to(device=network.weight.device, dtype=torch.bool).device.type == "cuda"
        computed = network(filled(2, 4)).view(8)
        assert computed.is_inference()
        assert computed.add_(1).device.type == "cuda"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_follows_the_lists_of_cuda(dtype: torch.dtype) -> None:
    values, network = filled(4, 4), nn.Linear(4, 4).to("cuda")
    with torch.autocast("cuda", dtype):
        lower = network(values)
        assert lower.dtype == dtype
        assert (values @ values).dtype == dtype
        assert functional.softmax(lower, -1).dtype == torch.float32
        assert functional.layer_norm(lower, (4,)).dtype == torch.float32
        assert (lower + values).dtype == torch.float32
        assert functional.silu(lower).dtype == dtype
    lower.float().sum().backward()
    assert network.weight.grad is not None
    assert network.weight.grad.dtype == torch.float32
    assert network(values).dtype == torch.float32
    with torch.autocast("cpu", dtype):
        assert network(values).dtype == torch.float32


def test_gradient_scaler_skips_an_overflow_and_halves_its_scale() -> None:
    weight = nn.Parameter(torch.ones(2, device="cuda"))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("cuda", init_scale=16.0)
    assert scaler.is_enabled()
    for factor, expected, scale in ((torch.inf, 1.0, 8.0), (0.5, 0.5, 8.0)):
        optimizer.zero_grad()
        scaler.scale((weight * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert weight.tolist() == [expected] * 2
        assert scaler.get_scale() == scale


def test_gradient_checkpointing_computes_the_same() -> None:
    network, inputs = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).to("cuda"), filled(4, 4)
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        network.zero_grad()
        call = torch.utils.checkpoint.checkpoint if checkpointed else (lambda one, values, **_: one(values))
        with torch.autocast("cuda", torch.bfloat16):
            call(network, inputs, use_reentrant=False).float().sum().backward()
        gradients.append(network[0].weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_memory_is_counted_and_runs_out(accelerator: Accelerator) -> None:
    before = torch.cuda.memory_allocated()
    values = torch.zeros(1000, device="cuda")
    assert torch.cuda.memory_allocated() - before == 4096, "blocks of 512 bytes"
    view = values[:10]
    assert torch.cuda.memory_allocated() - before == 4096
    torch.cuda.reset_peak_memory_stats()
    del values
    assert torch.cuda.memory_allocated() - before == 4096
    del view
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() - before == 4096
    accelerator.limit_memory(2**20)
    assert torch.cuda.mem_get_info() == (2**20 - before, 2**20)
    with pytest.raises(torch.cuda.OutOfMemoryError, match="CUDA out of memory"):
        torch.zeros(2**20, device="cuda")
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.memory_allocated("cuda:1") == 0
    assert torch.zeros(2**20, device="cuda:1").device.index == 1


def test_queries_describe_the_device() -> None:
    assert torch.cuda.is_available()
    assert torch.cuda.device_count() == 2
    assert torch.cuda.current_device() == 0
    assert torch.cuda.get_device_name() == torch.cuda.get_device_properties(0).name
    assert torch.cuda.is_bf16_supported(including_emulation=False)
    with torch.cuda.device(1):
        assert torch.cuda.current_device() == 1
        assert torch.ones(1, device="cuda").device.index == 1
    with pretend_accelerator(bfloat16=False):
        assert not torch.cuda.is_bf16_supported(including_emulation=False)
        assert torch.cuda.is_bf16_supported()


def test_threads_use_the_device_too() -> None:
    made: list[Tensor] = []
    thread = threading.Thread(target=lambda: made.append(torch.ones(2, device="cuda") * 2))
    thread.start()
    thread.join()
    assert made[0].device.type == "cuda"


def test_nothing_is_left_behind(accelerator: Accelerator) -> None:
    names = ("is_available", "_lazy_init", "default_generators", "memory_allocated")
    with pretend_accelerator():
        inner = [getattr(torch.cuda, name) for name in names]
    assert all(getattr(torch.cuda, name) is not one for name, one in zip(names, inner, strict=True))
    assert torch.cuda.device_count() == 2, "those of the fixture again"
