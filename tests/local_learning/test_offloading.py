"""What of a network is in memory while a block is trained, and that all of it is there before and afterwards."""

import numpy
import pytest
import torch
from local_learning.networks import fitted, flux, images, network, profiled_as, stopped, uncompiled, values
from torch import nn

from convbn_compile.local_learning import _inputs
from convbn_compile.local_learning._local import resident_bytes
from convbn_compile.local_learning._offloading import Offloading
from convbn_compile.local_learning.worker import Worker

LEFT = 16
"""Bytes that a tensor takes that is not there."""


def made(number=3):
    """A network that is built, and its values."""
    run = flux("nowhere", network())
    run._build(images()[:2][0])
    units = run._network.units[:number]
    kept = [{name: tensor.clone() for name, tensor in unit.state_dict().items()} for unit in units]
    return units, kept


def in_memory(units):
    """Which parts are."""
    parts = {(index, name): getattr(unit, name) for index, unit in enumerate(units) for name in ("unit", "head")}
    return {
        part for part, module in parts.items() if not any(each.isnan().any() for each in module.state_dict().values())
    }


def same(units, kept):
    return all(
        torch.equal(unit.state_dict()[name], one)
        for unit, old in zip(units, kept, strict=True)
        for name, one in old.items()
    )


def test_what_is_used_is_there_and_nothing_else():
    units, kept = made()
    memory = Offloading(units, torch.device("cpu"), kept.__getitem__)
    memory.use(range(1, 3), range(1))
    assert in_memory(units) == {(0, "unit"), (1, "unit"), (1, "head"), (2, "unit"), (2, "head")}
    with memory.using(range(2)):
        assert in_memory(units) == {(0, "unit"), (1, "unit")}
    assert in_memory(units) == {(0, "unit"), (1, "unit"), (1, "head"), (2, "unit"), (2, "head")}
    memory.use(range(0))
    assert in_memory(units) == set()
    tensors = [tensor for unit in units for tensor in (*unit.parameters(), *unit.buffers())]
    assert sum(map(resident_bytes, units)) <= LEFT * len(tensors)
    memory.bring(torch.device("cpu"))
    assert same(units, kept)


def test_parameters_are_the_same_ones():
    """Those that an optimizer or the user has."""
    units, kept = made()
    before = {name: (one, one.shape, one.stride(), one.requires_grad) for name, one in units[0].named_parameters()}
    memory = Offloading(units, torch.device("cpu"), kept.__getitem__)
    memory.use(range(1, 2))
    assert {name: one.shape for name, one in units[0].named_parameters()} == {
        name: old[1] for name, old in before.items()
    }
    memory.bring(torch.device("cpu"))
    for name, one in units[0].named_parameters():
        assert one is before[name][0]
        assert (one.shape, one.stride(), one.requires_grad) == before[name][1:]


def test_values_are_read_where_they_are_missing_only():
    units, kept = made()
    reads = []
    memory = Offloading(units, torch.device("cpu"), lambda number: reads.append(number) or kept[number])
    memory.use(range(2))
    with torch.no_grad():
        next(units[0].parameters()).add_(1)
    memory.use(range(1), range(0))
    assert set(reads) == {0, 1}
    del reads[:]
    memory.use(range(1), range(0))
    assert not reads
    assert not same(units[:1], kept[:1])  # what is there stays what it is


def test_what_is_in_no_storage_stays():
    units, kept = made()
    units[1].unit.register_buffer("scale", torch.tensor([2.0]), persistent=False)
    memory = Offloading(units, torch.device("cpu"), kept.__getitem__)
    memory.use(range(1))
    assert units[1].unit.scale == 2.0
    memory.bring(torch.device("cpu"))
    assert units[1].unit.scale == 2.0


def test_what_cannot_be_read_frees_nothing():
    units, kept = made()

    def read(number):
        raise ValueError(f"unit {number} is damaged")

    memory = Offloading(units, torch.device("cpu"), read)
    with pytest.raises(ValueError, match="unit 1 is damaged"):
        memory.use(range(1, 2))
    assert same(units, kept)


def test_what_can_be_read_is_brought():
    units, kept = made()
    damaged = [1]

    def read(number):
        if number in damaged:
            raise ValueError(f"unit {number} is damaged")
        return kept[number]

    memory = Offloading(units, torch.device("cpu"), read)
    memory.use(range(1))
    with pytest.raises(ValueError, match="unit 1 is damaged"):
        memory.bring(torch.device("cpu"))
    assert in_memory(units) == {(number, name) for number in (0, 2) for name in ("unit", "head")}
    damaged.clear()
    memory.bring(torch.device("cpu"))
    assert same(units, kept)


def test_what_was_not_freed_keeps_its_values():
    """Though those of the run cannot be read, for whatever reason."""
    units, kept = made()

    def read(number):
        if number == 2:
            raise MemoryError("unit 2")
        return kept[number]

    memory = Offloading(units, torch.device("cpu"), read)
    with pytest.raises(MemoryError, match="unit 2"):
        memory.bring(torch.device("cpu"))
    assert same(units, kept)
    memory.use(range(1))
    with pytest.raises(MemoryError, match="unit 2"):
        memory.bring(torch.device("cpu"))
    assert same(units[:2], kept[:2])
    assert all(one.isnan().all() and one.is_contiguous() for one in units[2].parameters())


def test_gradients_of_what_is_not_there_are_freed():
    units, kept = made()
    for one in units[1].parameters():
        one.grad = torch.ones_like(one)
    Offloading(units, torch.device("cpu"), kept.__getitem__).use(range(1))
    assert all(one.grad is None for one in units[1].parameters())


class Versioned(nn.Module):
    """Converts what older versions wrote."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x):
        return x * self.weight

    def _load_from_state_dict(self, state, prefix, metadata, *more):
        if metadata.get("version") != 2:
            state[prefix + "weight"] = 100 * state[prefix + "weight"]
        super()._load_from_state_dict(state, prefix, metadata, *more)


class Average(nn.Module):
    """With a buffer that forward puts another tensor in place of."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 2, 3))
        return x - self.mean.reshape(1, -1, 1, 1)


class Growing(Average):
    """With one of another shape."""

    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(1, 1)

    def forward(self, x):
        if self.training:
            self.mean = self.mean.reshape(-1).repeat(8)[:8]
        return super().forward(x)


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.phase = nn.Parameter(torch.ones(8, 1, 1, dtype=torch.complex64))

    def forward(self, x):
        return (x * self.phase).real


class Views(nn.Module):
    """With two parameters in one tensor."""

    def __init__(self):
        super().__init__()
        both = torch.ones(2, 8, 1, 1)
        self.scale, self.again = nn.Parameter(both[0]), nn.Parameter(both[1])

    def forward(self, x):
        return x * self.scale * self.again


class Tied(nn.Module):
    """With two parameters that are one."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.again = nn.Parameter(self.scale.data)

    def forward(self, x):
        return x * self.scale * self.again


MODULES = {
    "versions": Versioned,
    "a buffer that is replaced": Average,
    "a buffer that grows": Growing,
    "complex numbers": Complex,
    "views": Views,
    "two in one": Tied,
    "a parametrization": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1)),
    "spectral norm": lambda: nn.utils.spectral_norm(nn.Conv2d(8, 8, 1)),
    "nothing to keep": nn.Identity,
}


@pytest.mark.parametrize("case", MODULES)
def test_modules(case, tmp_path):
    """Values after a run are those that its files have, and it is the same run whether its block was freed or not."""
    runs = []
    for cache in ("always", "never"):
        torch.manual_seed(3)
        first, *others = network()
        run = fitted(tmp_path / cache, model=[nn.Sequential(first, MODULES[case]()), *others], cache=cache)
        runs.append(run)
        found = values(run)
        for number, unit in enumerate(run._network.units):
            (state,) = torch.load(tmp_path / cache / f"block_{number}.pt")
            assert all(torch.equal(found[f"{unit.name}.{name}"], value) for name, value in state.items())
            assert not any(value.isnan().any() for value in state.values())
    one, other = map(values, runs)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("kind", [Views, Tied])
def test_parameters_of_one_tensor_stay_in_it(kind, tmp_path):
    first, *others = network()
    both = kind()
    fitted(tmp_path, model=[nn.Sequential(first, both), *others], epochs=1)
    assert both.scale.untyped_storage().data_ptr() == both.again.untyped_storage().data_ptr()


def test_a_part_of_a_larger_tensor_stays_in_it(tmp_path):
    first, *others = network()
    weight, flat = first[0].weight, torch.zeros(1000)
    weight.data = flat[: weight.numel()].view_as(weight).copy_(weight)
    fitted(tmp_path, model=[first, *others], epochs=1, cache="always")
    assert torch.equal(flat[: weight.numel()].view_as(weight), weight)


def test_complex_numbers_are_freed():
    units, kept = made(1)
    units[0].unit.register_parameter("phase", nn.Parameter(torch.ones(1000, dtype=torch.complex64)))
    Offloading(units, torch.device("cpu"), kept.__getitem__).use(range(0))
    assert resident_bytes(units[0]) < 1000


class Secret(nn.Sequential):
    """With a state that is no data."""

    def get_extra_state(self):
        return {"rate": numpy.float64(0.1)}

    def set_extra_state(self, state):
        pass


def test_a_state_that_cannot_be_read(tmp_path):
    first, *others = network()
    modules = [Secret(first), *others]
    before = [value.clone() for module in others for value in module.state_dict().values()]
    with pytest.raises(ValueError, match="start.pt cannot be read as data: a state dict has to be of tensors"):
        fitted(tmp_path, model=modules, epochs=1)
    assert all(map(torch.equal, (value for module in others for value in module.state_dict().values()), before))
    assert fitted(tmp_path, model=[nn.Sequential(first), *others], epochs=1).exits()  # once it is data


WAYS = {"always": [0, 0, 0], "never": [0, 1, 2]}


@pytest.mark.parametrize("cache", WAYS)
def test_a_block_and_what_computes_its_input_are_there(cache, tmp_path, monkeypatch):
    """Other blocks, and heads of those that are done, are not, neither in training nor while caches are written."""
    seen, epoch, accuracies = [], Worker.epoch, Worker.accuracies
    run = profiled_as(flux(tmp_path, cache=cache), 9, 14, 20)
    units = run._network.units
    monkeypatch.setattr(Worker, "epoch", lambda *args: seen.append(in_memory(units)) or epoch(*args))
    monkeypatch.setattr(Worker, "accuracies", lambda *args: seen.append(in_memory(units)) or accuracies(*args))
    written, during = _inputs.Inputs._written, []
    monkeypatch.setattr(_inputs.Inputs, "_written", lambda *args: during.append(in_memory(units)) or written(*args))
    with uncompiled():
        run.fit(images(), images(24, 2), 1, progress=False)
    expected = [
        {(block, "unit"), (block, "head"), *((before, "unit") for before in range(block - number, block))}
        for block, number in enumerate(WAYS[cache])
    ]
    assert seen == [each for each in expected for _ in range(2)]
    assert during == ([{(0, "unit")}] * 2 + [{(1, "unit")}] * 2 if cache == "always" else [])
    assert in_memory(units) == {(index, name) for index in range(3) for name in ("unit", "head")}


def test_no_block_is_there_while_a_damaged_cache_is_made_again(tmp_path, monkeypatch):
    stopped(tmp_path, monkeypatch, 1, 1)
    (tmp_path / "cache_0_train.npy").unlink()
    run = profiled_as(flux(tmp_path, network(dropout=0.2), cache="always"), 9, 14, 20)
    during, written = [], _inputs.Inputs._written
    units = run._network.units
    monkeypatch.setattr(_inputs.Inputs, "_written", lambda *args: during.append(in_memory(units)) or written(*args))
    with uncompiled():
        run.fit(images(), images(24, 2), 3, progress=False)
    assert during[0] == {(0, "unit")}


def test_measured_bytes_have_what_is_there(tmp_path, monkeypatch):
    """All of the network's bytes that are in memory are in what is measured."""
    found, measured = [], Worker._measured
    run = profiled_as(flux(tmp_path, cache="never"), 9, 14, 20)

    def look(self, *args):
        losses = measured(self, *args)
        optimizers = sum(resident_bytes(nn.Module(), optimizer) for optimizer in self.optimizers)
        found.append((sum(map(resident_bytes, run._network.units)) + optimizers, self.measured))
        return losses

    monkeypatch.setattr(Worker, "_measured", look)
    with uncompiled():
        run.fit(images(), images(24, 2), 1, progress=False)
    assert len(found) == 3
    assert all(there <= all_of_it + LEFT * 40 for there, all_of_it in found)


def test_an_error_leaves_the_network_with_values(tmp_path, monkeypatch):
    modules = network()
    start = [module.state_dict() for module in modules]
    start = [{name: value.clone() for name, value in state.items()} for state in start]
    epoch = Worker.epoch
    calls = []

    def failing(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return epoch(self, *args)

    monkeypatch.setattr(Worker, "epoch", failing)
    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path, model=modules)
    states = [module.state_dict() for module in modules]
    assert not any(value.isnan().any() for state in states for value in state.values())
    assert not torch.equal(states[0]["0.weight"], start[0]["0.weight"])  # a block that is done
    for state, old in zip(states[1:], start[1:], strict=True):
        assert all(torch.equal(value, old[name]) for name, value in state.items())


def test_more_interrupts_leave_the_network_with_values(tmp_path, monkeypatch):
    modules, bring, calls = network(), Offloading.bring, []

    def interrupted(self, home):
        calls.append(1)
        if len(calls) < 4:
            raise KeyboardInterrupt
        bring(self, home)

    monkeypatch.setattr(Offloading, "bring", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path, model=modules, epochs=1, cache="always")
    assert not any(value.isnan().any() for module in modules for value in module.state_dict().values())


@pytest.mark.parametrize("file", ["start.pt", "block_0.pt"])
def test_damaged_values_leave_the_network_as_it_was(file, tmp_path, monkeypatch):
    """Also those that a run needs late."""
    stopped(tmp_path, monkeypatch, 1, 1)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:-1])
    modules = network(seed=3, dropout=0.2)
    before = [value.clone() for module in modules for value in module.state_dict().values()]
    with pytest.raises(ValueError, match=f"{file} is missing or damaged"):
        fitted(tmp_path, model=modules, epochs=3, cache="always")
    after = [value for module in modules for value in module.state_dict().values()]
    assert all(map(torch.equal, after, before))


def test_what_a_run_comes_to_is_in_its_files(tmp_path):
    run = fitted(tmp_path, epochs=1)
    files = [torch.load(tmp_path / f"block_{number}.pt") for number in range(3)]
    found = values(run)
    for unit, (state,) in zip(run._network.units, files, strict=True):
        assert all(torch.equal(found[f"{unit.name}.{name}"], value) for name, value in state.items())
