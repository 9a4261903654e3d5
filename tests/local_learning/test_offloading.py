"""What of a network is in memory while a block is trained, and that all of it is there before and afterwards."""

import pytest
import torch
from local_learning.networks import fitted, flux, images, network, profiled_as, uncompiled, values
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
    memory = Offloading(units, torch.device("cpu"), lambda: kept)
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
    memory = Offloading(units, torch.device("cpu"), lambda: kept)
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
    memory = Offloading(units, torch.device("cpu"), lambda: reads.append(1) or kept)
    memory.use(range(2))
    with torch.no_grad():
        next(units[0].parameters()).add_(1)
    memory.use(range(1), range(0))
    assert len(reads) == 1
    assert not same(units[:1], kept[:1])  # what is there stays what it is


def test_what_is_in_no_storage_stays():
    units, kept = made()
    units[1].unit.register_buffer("scale", torch.tensor([2.0]), persistent=False)
    memory = Offloading(units, torch.device("cpu"), lambda: kept)
    memory.use(range(1))
    assert units[1].unit.scale == 2.0
    memory.bring(torch.device("cpu"))
    assert units[1].unit.scale == 2.0


def test_what_could_not_be_read_is_read_again():
    units, kept = made()
    failing = [True]

    def read():
        if failing.pop():
            raise OSError("damaged")
        return kept

    memory = Offloading(units, torch.device("cpu"), read)
    with pytest.raises(OSError, match="damaged"):
        memory.use(range(1))
    failing.append(False)
    memory.bring(torch.device("cpu"))
    assert same(units, kept)


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


def test_damaged_values_leave_the_network_as_it_was(tmp_path):
    fitted(tmp_path, epochs=1)
    file = tmp_path / "start.pt"
    file.write_bytes(file.read_bytes()[:-1])
    modules = network(seed=3)
    before = [value.clone() for module in modules for value in module.state_dict().values()]
    with pytest.raises(ValueError, match="start.pt is missing or damaged"):
        fitted(tmp_path, model=modules, epochs=1)
    after = [value for module in modules for value in module.state_dict().values()]
    assert all(map(torch.equal, after, before))


def test_what_a_run_comes_to_is_in_its_files(tmp_path):
    run = fitted(tmp_path, epochs=1)
    files = [torch.load(tmp_path / f"block_{number}.pt") for number in range(3)]
    found = values(run)
    for unit, (state,) in zip(run._network.units, files, strict=True):
        assert all(torch.equal(found[f"{unit.name}.{name}"], value) for name, value in state.items())
