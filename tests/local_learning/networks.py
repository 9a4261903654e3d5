"""Small networks and data for the tests of local learning, and compilation left out where it is not what is tested."""

import contextlib
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from convbn_compile.local_learning import NeuroFlux, Profile
from convbn_compile.local_learning._lines import UnitProfile
from convbn_compile.local_learning.partitioner import Partitioner
from convbn_compile.local_learning.storage import Storage

CLASSES = 4
IMAGES = 60
EAGER = {"lowering": "aot_eager"}


def unit(inputs, outputs, stride=1, *more):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(), *more
    )


def network(seed=0, dropout=0.0):
    """Three units that get smaller, and a classifier."""
    torch.manual_seed(seed)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(16, CLASSES))
    modules = [unit(3, 8), unit(8, 8, 2, nn.Dropout(dropout)), unit(8, 16, 2), head]
    for module in modules:
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.normal_(norm.running_mean)
                nn.init.uniform_(norm.running_var, 0.5, 2.0)
                nn.init.uniform_(norm.weight, 0.5, 2.0)
                nn.init.normal_(norm.bias)
    return modules


def images(number=IMAGES, seed=1, *, double=False):
    """A class is a direction, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % CLASSES
    directions = torch.randn(CLASSES, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    pixels = directions[labels] + torch.randn(number, 3, 8, 8, generator=generator)
    return TensorDataset(pixels.double() if double else pixels, labels)


@contextlib.contextmanager
def uncompiled():
    """Steps run as they are written."""
    with mock.patch("convbn_compile._torch.compile_for_any_batch", lambda function, **_: function):
        yield


def flux(folder, model=None, **changed):
    """Of the network."""
    options = {"batch_size_limit": 20, "lr_batch_size": 20, "options": EAGER, "similarity": 0.1, **changed}
    budget = options.pop("memory_budget", 200_000)
    return NeuroFlux(network() if model is None else model, CLASSES, budget, folder, **options)


def profiled_as(run, *batches):
    """A plan with these batches, without measuring: what is measured depends on the processor."""
    dtype = next(run._units.units[0].module.parameters()).dtype
    built = run._build(images()[:2][0].to(dtype))
    usable = run.memory_budget * (1 - run.margin)
    run._profile = Profile(
        tuple(
            UnitProfile(unit.name, shape, 0, 1, 0, (), slope=usable / (batch + 0.5))
            for unit, shape, batch in zip(built.units, built.shapes, batches, strict=True)
        )
    )
    limit, similarity = run.batch_size_limit, run.similarity
    run._plan = Partitioner(run.memory_budget, run.margin, limit, similarity).plan(run._profile.units)
    return run


def values(local):
    """All parameters and buffers of a run."""
    return {
        f"{unit.name}.{name}": tensor.clone()
        for unit in local._network.units
        for name, tensor in unit.state_dict().items()
    }


def fitted(folder, *, epochs=2, model=None, data=None, val=None, batches=(9, 14, 20), **changed):
    """A run that is done, in three blocks of one unit each, without compilation."""
    run = profiled_as(flux(folder, model, **changed), *batches)
    with uncompiled():
        run.fit(data or images(), val or images(24, 2), epochs, progress=False)
    return run


class _StopError(Exception):
    pass


def stopped(folder, monkeypatch, block, epoch, **changed):
    """A run that ended with an error after so much of it was committed."""
    commit = Storage.commit

    def stop(self, manifest, needed):
        commit(self, manifest, needed)
        if (manifest["block"], manifest["epoch"], manifest["source"] is not None) == (block, epoch, True):
            raise _StopError

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "commit", stop)
        with pytest.raises(_StopError):
            fitted(folder, epochs=3, model=network(dropout=0.2), cache="always", **changed)
