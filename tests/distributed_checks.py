"""What two processes check of DDP, FSDP2, SyncBatchNorm and checkpoints; tests/test_distributed.py runs it.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/distributed_checks.py results.json

Each check is run by both processes, gloo on CPU; what fails is written down by name, as a traceback of each rank.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import json
import os
import runpy
import shutil
import sys
import tempfile
import traceback
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import distributed as example
import pytest
import torch
import torch._dynamo
import torch._functorch.config
import torch._inductor.config
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support import compiled, counted, randomise, relative_errors
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.modules._functions import SyncBatchNorm as Synchronise
from torch.nn.parallel import DistributedDataParallel

import convbn_compile as cb
from convbn_compile import deploy
from convbn_compile.backend import warn_once
from convbn_compile.lowering import SPLIT_BY_DDP
from convbn_compile.reversible import make_reversible

CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


class Block(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x):
        return self.bn(self.conv(x)).relu()


class Net(nn.Module):
    """In float64 c and d fill a bucket of 1 MiB each, the smallest: DDP splits the graph in three. d has c's code."""

    def __init__(self):
        super().__init__()
        self.a = Block(3, 16)
        self.b = Block(16, 128)
        self.c = Block(128, 128)
        self.d = Block(128, 128)
        self.head = nn.Linear(128, 5)

    def forward(self, x):
        return self.head(self.d(self.c(self.b(self.a(x)))).mean((2, 3)))


class Short(nn.Module):
    """b fills a bucket: DDP splits the graph in two."""

    def __init__(self):
        super().__init__()
        self.a = Block(3, 128)
        self.b = Block(128, 128)

    def forward(self, x):
        return self.b(self.a(x))


BLOCKS = ("a", "b", "c", "d")


def net(make=Net):
    torch.manual_seed(0)
    return randomise(make()).double()


def batch(dtype=torch.float64):
    """The whole of it; this rank's part is every second image."""
    images = torch.randn(8, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(dtype)
    return images, images[dist.get_rank() :: 2]


def on(model, **options):
    return cb.turn_on(model, **{"lowering": "aot_eager", **options})


def ddp(model, **options):
    return DistributedDataParallel(model, bucket_cap_mb=1, **options)


def sharded(model, *paths, **options):
    for path in paths:
        fully_shard(model.get_submodule(path), **options)
    return fully_shard(model, **options)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(model):
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name.removeprefix("module."): None if grad is None else whole(grad).clone() for name, grad in found.items()}


def backward(model, images, weight=1.0):
    output = model(images)
    (weight * output.square().mean()).backward()


def alone(model, images):
    """The gradients of one process, eager, on the joined batch."""
    backward(model, images)
    return gradients(model)


def assert_as_one_process(model, wanted, steps=2, backward=backward, tolerance=1e-10):
    """Gradients equal on both ranks, to the bit, and to those of one process; DDP orders its buckets after step 1."""
    for _ in range(steps):
        model.zero_grad()
        backward(model, batch()[1])
    found = gradients(model)
    errors = relative_errors(found, wanted)
    assert max(errors.values()) <= tolerance, errors
    flat = torch.cat([grad.flatten() for grad in found.values() if grad is not None])
    both = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(both, flat)
    assert torch.equal(*both)


# --- DDP -------------------------------------------------------------------------------------------------------------


def check_ddp(wrap, make=Net, graphs=3, folded=4):
    wanted = alone(net(make), batch()[0])
    with counted() as counts:
        model = wrap(net(make))
        assert_as_one_process(model, wanted)
    assert (counts.graphs, counts.folded, counts.reasons) == (graphs, folded, [])
    return model


@check
def ddp_around_a_model_that_is_on():
    model = check_ddp(lambda model: ddp(on(model)))
    assert list(model.state_dict()) == [f"module.{name}" for name in net().state_dict()]
    report = cb.explain(model, batch()[1])
    assert [item.module for item in report.rewrites] == ["a.bn", "b.bn", "c.bn", "d.bn"]
    assert not report.refused


@check
def turn_on_of_ddp_turns_on_inside():
    model = check_ddp(lambda model: on(ddp(model)))
    assert not model.train().module.a.bn.training
    with pytest.raises(ValueError, match="already compiled"):
        on(model)
    cb.turn_off(model)
    assert model.train().module.a.bn.training
    assert not cb.freeze_batch_norm(model, skip=["a.bn"]).train().module.b.bn.training
    with pytest.raises(TypeError, match=r"not what torch.compile returned: pass model\.module\._orig_mod\."):
        on(ddp(torch.compile(net())))
    compiled_by_the_user = ddp(net())
    compiled_by_the_user.compile(backend="eager")
    with pytest.raises(ValueError, match=r"by nn\.Module\.compile\(\)"):
        on(compiled_by_the_user)


@check
def turn_on_of_a_sequential_in_ddp():
    """torch.compile(DDP(nn.Sequential(...))) compiles nothing."""
    model = net(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    wanted = alone(copy.deepcopy(model), batch()[0])
    with counted() as counts:
        assert_as_one_process(on(ddp(model)), wanted)
    assert counts.folded == 1


@check
def ddp_with_inductor():
    check_ddp(lambda model: ddp(on(model, lowering="inductor")), make=Short, graphs=2, folded=2)


@check
def ddp_static_graph():
    check_ddp(lambda model: ddp(on(model), static_graph=True, gradient_as_bucket_view=True))


@check
def ddp_of_a_reversible_chain():
    """Gradients of parameters inside of a chain go through DDP's hooks."""

    def reversible():
        model = net()
        make_reversible(model.eval(), 0.3, 0.7, chains=[["c", "d"]], anchor_every=1)
        return model

    images, mine = batch()
    assert_as_one_process(ddp(reversible()), alone(reversible(), images))


@check
def ddp_find_unused_parameters():
    def make():
        model = Net()
        model.unused = nn.Linear(2, 2)
        return model

    wanted = alone(net(make), batch()[0])
    with counted() as counts:
        assert_as_one_process(ddp(on(net(make)), find_unused_parameters=True), wanted)
    assert counts.folded == 4


@check
def ddp_no_sync():
    """Two micro-batches, the first without communication."""

    def accumulate(model, images):
        with model.no_sync():
            backward(model, images[:2], 0.5)
        backward(model, images[2:], 0.5)

    wanted = alone(net(), batch()[0])
    with counted() as counts:
        assert_as_one_process(ddp(on(net())), wanted, backward=accumulate)
    assert counts.folded == 4


@check
def ddp_broadcasts_the_statistics_of_rank_0():
    """They are written without a change of version, and Tune computes with them."""
    wanted = alone(net(), batch()[0])
    model = ddp(on(net()))
    mean = model.module.a.bn.running_mean
    if dist.get_rank() == 1:
        mean.add_(1)
    version = mean._version
    assert_as_one_process(model, wanted)
    assert mean._version == version
    assert torch.equal(mean, net().a.bn.running_mean)


class Wide(nn.Module):
    """The parameters of the second norm fill a bucket and so do its convolution's: DDP splits the graph in three."""

    def __init__(self):
        super().__init__()
        self.block = Block(3, 4)
        self.conv = nn.Conv2d(4, 2**16, 1, bias=False)
        self.bn = nn.BatchNorm2d(2**16)

    def forward(self, x):
        return self.bn(self.conv(self.block(x))).mean((2, 3))


@check
def a_norm_that_ddp_splits_from_its_convolution():
    """It is not folded, the report says why, no warning says that nothing is; and without the split it is folded."""
    wanted = alone(net(Wide), batch()[0])
    model = ddp(on(net(Wide)))
    with counted() as counts:
        assert_as_one_process(model, wanted)
    assert (counts.graphs, counts.folded) == (3, 1)
    report = cb.explain(model, batch()[1])
    assert [item.module for item in report.rewrites] == ["block.bn"]
    (refusal,) = report.refused
    assert refusal.module == "bn"
    assert refusal.reason.startswith("its input comes from outside this graph")
    assert refusal.reason.endswith(SPLIT_BY_DDP)
    with torch._dynamo.config.patch(optimize_ddp=False):
        assert cb.explain(model, batch()[1]).folded == 2


# --- FSDP2 -----------------------------------------------------------------------------------------------------------


def check_fsdp(wrap, folded, make=Net, **options):
    wanted = alone(net(make), batch()[0])
    with counted() as counts:
        model = wrap(net(make))
        assert_as_one_process(model, wanted, **options)
    assert (counts.folded, counts.reasons) == (folded, [])
    return model


@check
def fsdp_of_the_whole_model():
    model = check_fsdp(lambda model: on(sharded(model)), folded=4)
    assert list(model.state_dict()) == list(net().state_dict())
    assert cb.explain(model, batch()[1]).folded == 4


@check
def fsdp_of_a_model_that_is_on():
    check_fsdp(lambda model: sharded(on(model), *BLOCKS), folded=3)


@check
def fsdp_of_blocks():
    """d runs the graph that was compiled for c."""
    check_fsdp(lambda model: on(sharded(model, *BLOCKS)), folded=3)


@check
def explain_leaves_fsdp_as_it_was():
    def wrap(model):
        model = on(sharded(model))
        before = {name: type(parameter) for name, parameter in model.named_parameters()}
        cb.explain(model, batch()[1])
        assert {name: type(parameter) for name, parameter in model.named_parameters()} == before
        return model

    check_fsdp(wrap, folded=8)


class Strided(nn.Module):
    """Blocks of one class with other numbers: Dynamo makes inputs of the graph of those, if they are sharded."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = Block(3, 8), Block(8, 8), Block(8, 8)
        self.b.conv.stride = (2, 2)
        self.c.conv.padding = (2, 2)

    def forward(self, x):
        return self.c(self.b(self.a(x)))


@check
def fsdp_of_blocks_with_other_strides():
    wanted = alone(net(Strided), batch()[0])
    with counted() as counts:
        assert_as_one_process(on(sharded(net(Strided), *BLOCKS[:3])), wanted)
    assert (counts.folded, counts.reasons) == (3, []), counts


@check
def deploy_keeps_nothing_of_what_fsdp_gathers():
    """Gathered anew, parameters may get the memory that they had."""
    model, images = sharded(net(Doubled)), batch()[1]
    deployed = compiled(model, mode="deploy")
    with torch.no_grad():
        for _ in range(3):
            errors = relative_errors({"output": deployed(images)}, {"output": model(images)})
            assert errors["output"] <= 1e-10
            model.reshard()
            for parameter in model.parameters():
                parameter.to_local().mul_(2)
    assert not deploy.kept_of(model)


class Doubled(nn.Module):
    """Makes something of a parameter alone."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return nn.functional.conv2d(x, self.conv.weight * 2).mean((2, 3))


@check
def deploy_sees_the_steps_of_fsdp():
    """The parameters that graphs see keep identity and version, while all-gather writes other values into them."""
    for model in (sharded(net(Strided), "a"), sharded(net(Doubled))):
        deployed, images = compiled(model, mode="deploy"), batch()[1]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            with torch.no_grad():
                errors = relative_errors({"output": deployed(images)}, {"output": model(images)})
            assert errors["output"] <= 1e-10
            optimizer.zero_grad()
            backward(model, images)
            optimizer.step()


@check
def fsdp_of_blocks_turned_on_one_by_one():
    def wrap(model):
        for path in BLOCKS:
            on(model.get_submodule(path))
        return sharded(model, *BLOCKS)

    check_fsdp(wrap, folded=3)


@check
def fsdp_with_inductor():
    check_fsdp(lambda model: on(sharded(model), lowering="inductor"), folded=2, make=Short)


@check
def fsdp_without_gradient_sync():
    def accumulate(model, images):
        model.set_requires_gradient_sync(False)
        backward(model, images[:2], 0.5)
        model.set_requires_gradient_sync(True)
        backward(model, images[2:], 0.5)

    check_fsdp(lambda model: on(sharded(model, *BLOCKS)), folded=3, backward=accumulate)


@check
def fsdp_of_a_container_of_torch_nn():
    """Nothing is compiled, so a warning says so; gradients are right."""
    model = net(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    wanted = alone(copy.deepcopy(model), batch()[0])
    with counted() as counts:
        with warned("turn_on: fully_shard was applied to modules of torch.nn itself: the model itself."):
            on(fully_shard(model))
        assert_as_one_process(model, wanted)
    assert counts.graphs == 0
    with warned("explain: fully_shard was applied to modules of torch.nn itself: the model itself."):
        report = cb.explain(model, batch()[1])
    assert (report.folded, [item.module for item in report.refused]) == (0, ["1"])
    assert report.refused[0].reason.startswith("torch.compile does not compile it: fully_shard was applied")


@check
def scaling_coefficients_of_sharded_and_wrapped_models():
    wanted = cb.scaling_coefficients(net())
    assert len(wanted.norms) == 4
    for wrap in (lambda model: sharded(model, *BLOCKS), ddp, torch.compile, lambda model: ddp(torch.compile(model))):
        assert cb.scaling_coefficients(wrap(net())) == wanted


@check
def fsdp_of_a_container_of_blocks():
    """What is in the container is of a class that defines forward."""

    def make():
        return nn.ModuleDict({"layer": nn.Sequential(Block(3, 4), Block(4, 5))})

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = make()
            self.head = nn.Linear(5, 5)

        def forward(self, x):
            return self.head(self.layers["layer"](x).mean((2, 3)))

    wanted = alone(net(Model), batch()[0])
    with counted() as counts:
        assert_as_one_process(on(sharded(net(Model), "layers.layer", "head")), wanted)
    assert counts.folded == 2


@check
def fsdp_mixed_precision():
    """With statistics in bfloat16, too: eager refuses parameters in bfloat16 with others. Not less exact than eager."""
    wanted = alone(net(), batch()[0])
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    worst = {}
    for tune in (False, True):
        model = net().float()
        for block in BLOCKS:
            norm = model.get_submodule(block).bn
            norm.running_mean, norm.running_var = norm.running_mean.bfloat16(), norm.running_var.bfloat16()
        sharded(model, *BLOCKS, mp_policy=policy)
        with counted() as counts:
            backward(on(model) if tune else model, batch(torch.float32)[1])
        assert counts.folded == 3 * tune
        found = {name: grad.double() for name, grad in gradients(model).items()}
        worst[tune] = max(relative_errors(found, wanted).values())
    assert worst[True] <= 1.5 * worst[False], worst


# --- SyncBatchNorm ---------------------------------------------------------------------------------------------------


@check
def frozen_sync_batch_norm_folds():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(net())
    with counted() as counts:
        assert_as_one_process(on(sharded(model)).train(), alone(net(), batch()[0]))
    assert counts.folded == 4
    assert not cb.explain(model, batch()[1]).refused


class SyncOnCPU(nn.SyncBatchNorm):
    """nn.SyncBatchNorm without its check for a GPU, on the kernels below."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        own = (self.weight, self.bias, self.running_mean, self.running_var, self.eps, self.momentum)
        return Synchronise.apply(x, *own, dist.group.WORLD, dist.get_world_size())

    @classmethod
    def convert(cls, model):
        """convert_sync_batchnorm in place."""
        for block in map(model.get_submodule, BLOCKS):
            norm = cls(block.bn.num_features)
            norm.__dict__.update(block.bn.__dict__)
            block.bn = norm
        return model


@contextlib.contextmanager
def sync_batch_norm_kernels() -> Iterator[None]:
    """What torch has on GPUs only, in Python: x is (N, C, H, W)."""
    across = (0, 2, 3)

    def channels(values):
        return values.view(-1, 1, 1)

    def stats(x, eps):
        return x.mean(across), (x.var(across, unbiased=False) + eps).rsqrt()

    def gather(x, means, invstds, running_mean, running_var, momentum, eps, counts):
        share = (counts / counts.sum())[:, None]
        mean = (share * means).sum(0)
        var = (share * (invstds**-2 - eps + (means - mean) ** 2)).sum(0)
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * counts.sum() / (counts.sum() - 1), momentum)
        return mean, (var + eps).rsqrt()

    def forward(x, weight, bias, mean, invstd, eps):
        return (x - channels(mean)) * channels(invstd * weight) + channels(bias)

    def reduce(g, x, mean, invstd, weight, *_):
        sum_dy, sum_dy_xmu = g.sum(across), (g * (x - channels(mean))).sum(across)
        return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy

    def backward(g, x, mean, invstd, weight, sum_dy, sum_dy_xmu, counts):
        mean_dy, slope = sum_dy / counts.sum(), invstd**2 * sum_dy_xmu / counts.sum()
        return (g - channels(mean_dy) - (x - channels(mean)) * channels(slope)) * channels(invstd * weight)

    kernels = {
        "batch_norm_stats": stats,
        "batch_norm_gather_stats_with_counts": gather,
        "batch_norm_elemt": forward,
        "batch_norm_backward_reduce": reduce,
        "batch_norm_backward_elemt": backward,
    }
    library = torch.library.Library("aten", "IMPL")
    try:
        for name, kernel in kernels.items():
            library.impl(name, torch.compiler.disable(kernel), "CPU")
        yield
    finally:
        library._destroy()


@check
def sync_batch_norm_on_batch_statistics_is_left_alone():
    """Gradients and statistics are those of one process; the norms that are frozen fold, the other is reported."""

    def model():
        return SyncOnCPU.convert(net().train())

    one = net()
    one.c.bn.train()
    wanted = alone(one, batch()[0])
    with sync_batch_norm_kernels():
        found = on(sharded(model()), skip=["c.bn"]).train()
        with counted() as counts:
            assert_as_one_process(found, wanted, steps=1)
        assert counts.folded == 3
        assert max(relative_errors(dict(found.named_buffers()), dict(one.named_buffers())).values()) <= 1e-10
        report = cb.explain(found, batch()[1])
    assert report.folded == 3
    (refusal,) = report.refused
    assert refusal.module == "c.bn"
    assert "batch statistics (training mode), which nn.SyncBatchNorm gathers outside the graph" in refusal.reason


# --- checkpoints -----------------------------------------------------------------------------------------------------


def train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        images = torch.randn(4, 3, 4, 4, dtype=torch.float64, generator=generator)
        optimizer.zero_grad()
        backward(model, images)
        optimizer.step()


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def save(model, optimizer, path):
    weights, moments = get_state_dict(model, optimizer)
    assert list(weights) == list(net(Short).state_dict())
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=path)


def load(model, optimizer, path):
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


@check
def resumed_training_equals_uninterrupted():
    """To the bit with the strategy that saved; to rounding with the other, which sums gradients in another order."""
    strategies = {"ddp": lambda: on(ddp(net(Short))), "fsdp": lambda: on(sharded(net(Short), "a", "b"))}
    paths = [directory() for _ in strategies]
    final = {}
    for path, (strategy, make) in zip(paths, strategies.items(), strict=True):
        model = make()
        optimizer = adam(model)
        train(model, optimizer, range(2))
        save(model, optimizer, path)
        train(model, optimizer, range(2, 4))
        final[strategy] = parameters(model)
    for path, saved in zip(paths, strategies, strict=True):
        for strategy, make in strategies.items():
            model = make()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
            optimizer = adam(model)
            load(model, optimizer, path)
            train(model, optimizer, range(2, 4))
            errors = relative_errors(parameters(model), final[saved])
            assert max(errors.values()) <= (0 if strategy == saved else 1e-10), (saved, strategy, errors)


def directory():
    """A new one, the same for both ranks."""
    path = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(path)
    return Path(path[0])


EXAMPLE = {"epochs": 2, "batch_size": 32, "lr": 3e-3, "lowering": "aot_eager"}


def the_example_runs(checkpoints: Path, printed: list[str]) -> None:
    """As torchrun starts it, before there is a process group: it makes its own, and rank 0 prints."""
    options = {"checkpoints": checkpoints, **EXAMPLE}
    arguments = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    with (
        mock.patch.object(sys, "argv", ["distributed.py", *arguments]),
        contextlib.redirect_stdout(io.StringIO()) as output,
    ):
        runpy.run_path(str(example.__file__), run_name="__main__")
    printed += output.getvalue().splitlines()
    if os.environ["RANK"] == "0":
        assert printed[0].startswith("ddp, 2 processes: folded 3 of 3 norms")
        assert [line.split(":")[0] for line in printed[1:]] == ["epoch 1", "epoch 2"]
    else:
        assert not printed


def the_example_resumes(checkpoints: Path, printed: list[str]) -> None:
    """From its checkpoint of DDP with FSDP2: the loss is that of DDP without a stop."""
    told, lines = [printed], []
    dist.broadcast_object_list(told)
    if dist.get_rank() == 0:
        shutil.rmtree(checkpoints / "epoch_0002")
    dist.barrier()
    with mock.patch.object(example, "tell", lines.append):
        arguments = Namespace(strategy="fsdp2", resume=True, checkpoints=checkpoints, **EXAMPLE)
        example.run(arguments, torch.device("cpu"))
    facts, found = lines
    assert facts.startswith("fsdp2, 2 processes: folded 3 of 3 norms")
    wanted, found = (float(line.removeprefix("epoch 2: loss ")) for line in (told[0][2], found))
    assert abs(found - wanted) <= 1e-3 * wanted, lines


def parameters(model):
    return {name.removeprefix("module."): whole(value).detach().clone() for name, value in model.named_parameters()}


# --- running ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def warned(message: str) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    ours = [item for item in caught if str(item.message).startswith(message)]
    assert ours, [str(item.message) for item in caught]
    assert {item.filename for item in ours} == {__file__}, "it points at somebody else's line"


def run(function: Callable[[], None]) -> str | None:
    """The traceback, if it fails; what convbn_compile warns of is a failure."""
    torch._dynamo.reset()
    warn_once.cache_clear()
    with warnings.catch_warnings():
        for ours in ("convbn_tune", "turn_on", "explain"):
            warnings.filterwarnings("error", message=ours)
        try:
            function()
        except Exception:  # noqa: BLE001
            return traceback.format_exc()
    return None


def main(file: str, *names: str) -> None:
    torch._functorch.config.enable_autograd_cache = False
    torch._inductor.config.fx_graph_cache = False
    gc.set_threshold(10_000, 10, 10)  # this and the next as in conftest.py
    torch._inductor.config.cpp.simdlen = 1
    path, printed = Path(file).absolute(), []
    example_given = path.with_suffix(".checkpoints"), printed
    example_runs = run(partial(the_example_runs, *example_given))
    # not by torchrun's store: what the example's group wrote there is still in it
    where = {"init_method": f"file://{path}.group", "rank": int(os.environ["RANK"]), "world_size": 2}
    dist.init_process_group("gloo", timeout=timedelta(seconds=60), **where)
    results: dict[str, list[Any]] = {"the_example_runs": [None, None]}
    dist.all_gather_object(results["the_example_runs"], example_runs)
    CHECKS["the_example_resumes"] = partial(the_example_resumes, *example_given)
    for name, function in CHECKS.items():
        if not names or name in names:
            results[name] = [None, None]
            dist.all_gather_object(results[name], run(function))
    if dist.get_rank() == 0:
        path.write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
