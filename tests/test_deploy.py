"""mode="deploy": folded once, and again whenever a weight changes, in whichever way."""

import collections
import copy
import gc
import threading
import warnings

import pytest
import torch
import torch._inductor.config
from support import compiled, counted, difference, randomise
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing._internal.two_tensor import TwoTensor

import convbn_compile as cb
from convbn_compile import _constants, deploy
from convbn_compile._torch import is_view


def net():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False), nn.BatchNorm2d(4)
    )
    return randomise(model).double()


X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def kept(model):
    """What the one graph keeps that reads the model."""
    ((_, _, folded),) = deploy.kept_of(model)
    return folded.kept


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def step(model, **options):
    """One step of an optimizer, on made-up gradients."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(model.parameters(), lr=0.1, **options).step()


def compiled_step(model):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.compile(lambda: optimizer.step(), backend="aot_eager")()


def perturbed(model):
    return {name: 1.5 * value for name, value in model.state_dict().items()}


def swap_average(model):
    """What training scripts do to evaluate averaged weights."""
    average = torch.optim.swa_utils.AveragedModel(copy.deepcopy(model))
    step(average.module)
    for mine, averaged in zip(model.parameters(), average.module.parameters(), strict=True):
        mine.data, averaged.data = averaged.data, mine.data


def train_batch_norm(model):
    """Eager batch norm in training mode counts no version for its running statistics."""
    model.train()(torch.randn_like(X))
    model.eval()


def train_batch_norm_compiled(model):
    torch.compile(model.train(), backend="aot_eager")(torch.randn_like(X))
    model.eval()


def through_a_view(model):
    model[0].weight.detach().view(-1)[3:30].mul_(2)


CHANGES = {
    "optimizer step": step,
    "optimizer step, foreach": lambda model: step(model, foreach=True),
    "optimizer step, fused": lambda model: step(model, fused=True),
    "optimizer step, compiled": compiled_step,
    "load_state_dict": lambda model: model.load_state_dict(perturbed(model)),
    "load_state_dict, assign": lambda model: model.load_state_dict(perturbed(model), assign=True),
    "in place": lambda model: model[4].bias.add_(1),
    "in place, one statistic": lambda model: model[1].running_var.mul_(3),
    "in place, foreach": lambda model: torch._foreach_mul_(list(model.parameters()), 1.5),
    "through a view": through_a_view,
    "averaged weights swapped in": swap_average,
    ".data = ": lambda model: setattr(model[3].weight, "data", torch.randn_like(model[3].weight)),
    "another parameter": lambda model: setattr(model[1], "weight", nn.Parameter(torch.randn_like(model[1].weight))),
    ".to() and back": lambda model: (model.float(), model[0].weight.mul_(2), model.double()),
    "batch norm trained": train_batch_norm,
    "batch norm trained, compiled": train_batch_norm_compiled,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_no_change_is_missed(change):
    model = net()
    deployed = compiled(model, mode="deploy")
    assert difference(deployed(X), model(X)) <= 1e-12
    before = model(X)
    for _ in range(2):
        change(model)
        assert difference(before, model(X)) > 1e-3
        assert difference(deployed(X), model(X)) <= 1e-12
        before = model(X)


def test_no_change_is_missed_by_generated_code():
    model = net()
    deployed = compiled(model, mode="deploy", lowering="inductor")
    for change in (lambda _: None, step, swap_average, train_batch_norm, CHANGES["load_state_dict, assign"]):
        change(model)
        assert difference(deployed(X), model(X)) <= 1e-12
        assert deployed(X).stride() == model(X).stride()


def test_batch_norm_trained_after_to_is_not_missed():
    """.to() gives modules other buffers, and these other counters."""
    model = net()
    deployed = compiled(model, mode="deploy")
    deployed(X)
    model.float().double()
    deployed(X)
    train_batch_norm(model)
    assert difference(deployed(X), model(X)) <= 1e-12


def freeze_garbage(model):
    gc.freeze()


def other_counter(model):
    for norm in (model[1], model[4]):
        norm.num_batches_tracked = torch.tensor(0)


def no_counter(model):
    for norm in (model[1], model[4]):
        norm.num_batches_tracked = None


def ordered(model):
    """As models are that an older torch pickled."""
    for norm in (model[1], model[4]):
        norm.__dict__["_buffers"] = collections.OrderedDict(norm._buffers)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("change", [freeze_garbage, other_counter, no_counter, ordered])
def test_trained_batch_norm_with_counters_that_are_hard_to_find(change, first):
    model = net()
    deployed = compiled(model, mode="deploy")
    if first and change is not ordered:
        deployed(X)
    change(model)
    try:
        deployed(X)
        train_batch_norm(model)
        assert difference(deployed(X), model(X)) <= 1e-12
    finally:
        gc.unfreeze()


def test_memory_that_another_tensor_gets():
    """An allocator gives memory of the same size again, at the same address."""
    model = net()
    deployed = compiled(model, mode="deploy")
    deployed(X)
    for _ in range(10):
        shape = model[3].weight.shape
        model[3].weight.data = torch.empty(0, dtype=torch.float64)
        model[3].weight.data = torch.randn(shape, dtype=torch.float64)
        assert difference(deployed(X), model(X)) <= 1e-12


def test_tensors_can_be_swapped():
    """torch refuses to swap what is referred to weakly."""
    model = net()
    deployed = compiled(model, mode="deploy")
    deployed(X)
    torch.utils.swap_tensors(model[3].weight, nn.Parameter(torch.randn_like(model[3].weight)))
    assert difference(deployed(X), model(X)) <= 1e-12


class Doubled(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        return x * (self.weight * 2)


def test_weights_inside_of_other_tensors_are_folded_in_every_call():
    """What is written to the tensors inside of a subclass, such as DTensor, counts no version."""
    model = Doubled(TwoTensor(torch.randn(3, 8, 8).double(), torch.randn(3, 8, 8).double()))
    deployed = compiled(model, mode="deploy")
    for _ in range(3):
        model.weight.mul_(1.5)
        found, wanted = deployed(X), model(X)
        assert difference(found.a, wanted.a) <= 1e-12
        assert difference(found.b, wanted.b) <= 1e-12


def test_a_convolution_that_is_called_twice_is_folded_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = randomise(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))).double()

        def forward(self, x):
            return self.body(self.body(x).relu())

    model = Twice()
    assert difference(compiled(model, mode="deploy")(X), model(X)) <= 1e-12
    assert len(kept(model)) == 2


def test_old_weights_are_not_held():
    """A model that is given another dtype is compiled anew; nothing is kept for the graph of before."""
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 8, 3))).double().eval()
    deployed = compiled(model, mode="deploy")
    deployed(X)
    model.float()
    deployed(X.float())
    assert len(deploy.kept_of(model)) == 1


@torch._inductor.config.patch(freezing=True)
def test_freezing_is_off():
    """Switched on for the whole process, as some serving scripts do, it would keep the weights of the first call."""
    model = net()
    deployed = compiled(model, mode="deploy", lowering="inductor")
    deployed(X)
    step(model)
    assert difference(deployed(X), model(X)) <= 1e-12


class Folds:
    """Counts how often constants are made."""

    def __init__(self, monkeypatch):
        self.count, original = 0, deploy.Deployed._fold

        def fold(graph, key, sources):
            self.count += 1
            return original(graph, key, sources)

        monkeypatch.setattr(deploy.Deployed, "_fold", fold)


def test_folded_once(monkeypatch):
    model, folds = net(), Folds(monkeypatch)
    deployed = compiled(model, mode="deploy")
    with counted() as counts:
        for size in (8, 8, 8):
            deployed(X[..., :size])
    assert (folds.count, counts.folded) == (1, 2)
    model[0].weight.mul_(2)
    deployed(X)
    with torch.inference_mode():
        deployed(X)
    deployed(X)
    assert folds.count == 3  # inference mode has a graph of its own


def test_what_is_left_is_two_convolutions():
    model = net()
    compiled(model, mode="deploy")(X)
    ((graph, key, folded),) = deploy.kept_of(model)
    arithmetic = [node for node in graph._parts.rest.graph.nodes if node.op == "call_function" and not is_view(node)]
    names = [str(node.target) for node in arithmetic]
    assert names == ["aten.convolution.default", "aten.relu.default", "aten.convolution.default"]
    assert (len(key), len(folded.kept)) == (11, 4)


def test_addresses_stay():
    """CUDA graphs read what is kept where it was."""
    model = net()
    deployed = compiled(model, mode="deploy")
    deployed(X)
    addresses = [tensor.data_ptr() for tensor in kept(model)]
    step(model)
    assert difference(deployed(X), model(X)) <= 1e-12
    assert [tensor.data_ptr() for tensor in kept(model)] == addresses


def test_beside_modules_of_other_kinds():
    """Every module of the process is looked at for who has the weights."""
    others = [
        torch.jit.trace(nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8)),
        nn.Module.__new__(nn.Module),
        nn.LazyLinear(3),
    ]
    model = net()
    assert difference(compiled(model, mode="deploy")(X), model(X)) <= 1e-12
    assert others


def test_models_that_share_a_graph_are_folded_once_each(monkeypatch):
    """Dynamo runs the second with the code of the first: its guards do not tell them apart."""
    models = [net() for _ in range(3)]
    for model in models:
        step(model)
        train_batch_norm(model)
    folds = Folds(monkeypatch)
    deployed = [compiled(model, mode="deploy") for model in models]
    for _ in range(3):
        for function, model in zip(deployed, models, strict=True):
            assert difference(function(X), model(X)) <= 1e-12
    assert folds.count == 3
    train_batch_norm(models[1])
    for function, model in zip(deployed, models, strict=True):
        assert difference(function(X), model(X)) <= 1e-12
    assert folds.count == 4


def test_nothing_is_kept_of_a_model_that_is_no_more():
    model = net()
    compiled(model, mode="deploy")(X)
    ((graph, _, _),) = deploy.kept_of(model)
    assert graph.folded()
    del model
    gc.collect()
    assert not graph.folded()


def test_refresh_is_for_what_no_version_counts():
    model, other = net(), nn.Sequential(net(), nn.ReLU())
    deployed, others = compiled(model, mode="deploy"), compiled(other, mode="deploy")
    deployed(X)
    others(X)
    model[0].weight.data.mul_(2)
    assert difference(deployed(X), model(X)) > 1e-3
    assert cb.refresh(model[0]) == 1
    assert difference(deployed(X), model(X)) <= 1e-12
    assert cb.refresh(nn.Linear(1, 1)) == 0
    assert cb.refresh(deployed) == 1
    with pytest.raises(TypeError, match=r"refresh needs a torch.nn.Module, got 3 \(int\)."):
        cb.refresh(3)


def test_inside_ddp_that_sends_buffers_weights_are_folded_in_every_call(monkeypatch):
    class Wrapper:
        sends = True

        def will_sync_module_buffers(self):
            return self.sends

    model, folds = net(), Folds(monkeypatch)
    deployed = compiled(model, mode="deploy")
    deployed(X)
    monkeypatch.setattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", Wrapper())
    model[1].running_mean.data.add_(1)
    deployed(X)
    model[1].running_mean.data.add_(1)
    assert difference(deployed(X), model(X)) <= 1e-12
    Wrapper.sends = False
    deployed(X)
    assert folds.count == 3


def test_inference_tensors_are_never_taken_to_be_as_they_were():
    with torch.inference_mode():
        model = net()
        deployed = compiled(model, mode="deploy")
        deployed(X)
        model[0].weight.mul_(2)
        assert difference(deployed(X), model(X)) <= 1e-12


def test_refresh_while_another_thread_folds(monkeypatch):
    model = net()
    deployed = compiled(model, mode="deploy")
    deployed(X)
    folding, refreshed = threading.Event(), threading.Event()
    ((graph, key, _),) = deploy.kept_of(model)
    constants = graph._parts.constants.forward

    def slow(*sources):
        made = constants(*sources)
        folding.set()
        refreshed.wait(0.5)  # the main thread waits for the lock meanwhile
        return made

    monkeypatch.setattr(graph._parts.constants, "forward", slow)
    graph.forget(key)
    thread = threading.Thread(target=torch.no_grad()(deployed), args=(X,))
    thread.start()
    folding.wait()
    model[3].weight.data.mul_(2)
    assert cb.refresh(model) == 1
    refreshed.set()
    thread.join()
    assert difference(deployed(X), model(X)) <= 1e-12


class Scaled(nn.Module):
    """Returns what it makes of a weight, twice the same."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, dtype=torch.float64)

    def forward(self, x):
        weight = self.conv.weight * 2
        return self.conv._conv_forward(x, weight, None), weight.view(-1), self.conv.weight.exp(), self.conv.weight.exp()


def test_outputs_are_the_callers():
    model = Scaled()
    deployed = compiled(model, mode="deploy")
    for index in range(4):
        outputs = deployed(X)
        outputs[index].zero_()
        for other, (found, wanted) in enumerate(zip(outputs, model(X), strict=True)):
            assert other == index or difference(found, wanted) <= 1e-12


class Outputs(nn.Module):
    """Several outputs of one operator, and one that reads memory as it lies."""

    def __init__(self, *, strided):
        super().__init__()
        self.body, self.strided = net(), strided

    def forward(self, x):
        y = self.body(x)
        values, indices = nn.functional.max_pool2d(y, 2, return_indices=True)
        return (values, indices, *y.chunk(2, 1), *([y.as_strided((2, 8), (1, 4))] if self.strided else []))


@pytest.mark.parametrize("strided", [True, False])
def test_outputs_of_generated_code_lie_as_eagers(strided):
    model = Outputs(strided=strided).eval()
    found, wanted = compiled(model, mode="deploy", lowering="inductor")(X), model(X)
    assert [tensor.stride() for tensor in found] == [tensor.stride() for tensor in wanted]
    assert all(difference(*pair) <= 1e-12 for pair in zip(found, wanted, strict=True))
    kept_in_channels_last = [tensor.is_contiguous(memory_format=torch.channels_last) for tensor in kept(model)[1::2]]
    assert all(kept_in_channels_last) != strided


@torch.library.custom_op("convbn_compile_tests::counted_double", mutates_args=())
def counted_double(x: torch.Tensor) -> torch.Tensor:
    """Not a function of its input: somebody's own operator may have a state."""
    counted_double.calls += 1
    return x * counted_double.calls


counted_double.calls = 0
counted_double.register_fake(torch.empty_like)


class OwnOperator(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, dtype=torch.float64)

    def forward(self, x):
        return self.conv._conv_forward(x, counted_double(self.conv.weight), None)


def test_operators_that_are_not_torchs_are_called_in_every_call():
    deployed = compiled(OwnOperator(), mode="deploy")
    first, second = deployed(X), deployed(X)
    assert difference(second, 2 * first) <= 1e-10


class Counting(nn.Module):
    """A buffer that is written to in the graph, and noise on a weight."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, dtype=torch.float64)
        self.register_buffer("calls", torch.zeros(4, dtype=torch.float64))

    def forward(self, x):
        self.calls.add_(1)
        weight = nn.functional.dropout(self.conv.weight, 0.5, training=True)
        return self.conv._conv_forward(x, weight * self.calls[:, None, None, None].sqrt(), self.conv.bias * 2)


@pytest.mark.parametrize("lowering", ["aot_eager", "inductor"])
def test_what_the_graph_writes_to_and_random_numbers_are_no_constants(lowering):
    model = Counting()
    deployed = compiled(model, mode="deploy", lowering=lowering)
    outputs = [deployed(X) for _ in range(3)]
    assert model.calls.tolist() == [3.0] * 4
    assert difference(outputs[1], outputs[2]) > 1e-3
    assert [tuple(tensor.shape) for tensor in kept(model)] == [(4,)]


class Positions(nn.Module):
    """What no weight is part of, and what depends on the input's size, is not kept."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1, dtype=torch.float64)
        self.table = nn.Parameter(torch.randn(16, 4, dtype=torch.float64))

    def forward(self, x):
        y = self.conv(x) + torch.arange(8, dtype=torch.float64)
        return y + self.table.exp()[: x.shape[0]].sum(0)[:, None, None] + self.table.cos()[torch.arange(3)].sum()


def test_sizes_and_numbers():
    model = Positions()
    deployed = torch.compile(
        model, backend="convbn_tune", dynamic=True, options={"mode": "deploy", "lowering": "aot_eager"}
    )
    for batch in (2, 5, 2):
        x = torch.randn(batch, 3, 8, 8, dtype=torch.float64)
        assert difference(deployed(x), model(x)) <= 1e-12
    assert sorted(tuple(tensor.shape) for tensor in kept(model)) == [(), (16, 4)]


def test_parametrizations_are_computed_once():
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), randomise(nn.BatchNorm2d(8)))
    model = model.double().eval()
    deployed = compiled(model, mode="deploy")
    assert difference(deployed(X), model(X)) <= 1e-12
    assert len(kept(model)) == 2
    step(model)
    assert difference(deployed(X), model(X)) <= 1e-12


def test_casts_of_autocast_are_done_once():
    model, x = net().float(), X.float()
    deployed = compiled(model, mode="deploy")
    with torch.autocast("cpu", torch.bfloat16):
        deployed(x)
        step(model)
        found, eager = deployed(x).double(), model(x).double()
    assert {tensor.dtype for tensor in kept(model) if tensor.ndim == 4} == {torch.bfloat16}
    wanted = model.double()(X)
    assert difference(found, wanted) <= 2 * difference(eager, wanted)


class WithoutAutocast(nn.Module):
    """Makes a weight in full precision, whatever the caller's autocast."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.mix = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.conv._conv_forward(x, (self.mix @ self.conv.weight[:, :, 0, 0])[:, :, None, None], None)


def test_constants_are_made_as_they_were_traced():
    model, x = WithoutAutocast(), X.float()
    deployed = compiled(model, mode="deploy")
    with torch.autocast("cpu", torch.bfloat16):
        assert difference(deployed(x), model(x)) <= 1e-5


def test_branches_that_do_not_pay_in_training_are_merged_once():
    """Adding weights up is more work than it saves at 16 places."""
    branches = [nn.Sequential(nn.Conv2d(8, 8, size, padding=size // 2), nn.BatchNorm2d(8)) for size in (3, 1)]

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.branches = nn.ModuleList(branches)

        def forward(self, x):
            return self.branches[0](x) + self.branches[1](x)

    merged, model = {}, randomise(Sum())
    for mode in ("tune", "deploy"):
        with counted() as counts:
            compiled(model, mode=mode)(torch.randn(1, 8, 4, 4))
        merged[mode] = counts.merged
    assert merged == {"tune": 0, "deploy": 1}


def test_folds_that_do_not_pay_in_training_pay_once():
    """A weight larger than its output is scaled in no call; in Tune mode it would be in every one."""
    model = randomise(nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)))
    folded = {}
    for mode in ("tune", "deploy"):
        with counted() as counts, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled(model, mode=mode)(torch.randn(2, 64))
        folded[mode] = counts.folded
    assert folded == {"tune": 0, "deploy": 1}


class Generated(nn.Module):
    """A convolution whose weight comes from the input."""

    def __init__(self):
        super().__init__()
        self.norm = randomise(nn.BatchNorm2d(64)).double()

    def forward(self, x):
        weight = x.mean((0, 2, 3)).outer(x.flatten()[:64]).T[:, :, None, None]
        return self.norm(nn.functional.conv2d(x[:1, :, :2, :2], weight))


def test_weights_that_are_not_kept_are_folded_if_it_pays():
    model = Generated()
    with counted() as counts:
        assert difference(compiled(model, mode="deploy")(X), model(X)) <= 1e-12
    assert counts.folded == 1
    with counted() as counts:
        compiled(model, mode="deploy")(torch.randn(2, 64, 2, 2, dtype=torch.float64)[:, :, :1, :1])
    assert counts.folded == 0
    assert "which would be scaled, is larger than that" in counts.reasons[0]


def test_generated_code_reads_weights_as_they_are_kept():
    model = net()
    compiled(model, mode="deploy", lowering="inductor")(X)
    weights = [tensor for tensor in kept(model) if tensor.ndim == 4]
    assert len(weights) == 2
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def test_training_and_evaluating_in_turn():
    model = net()
    reference = copy.deepcopy(model)
    tuned, deployed = compiled(model), compiled(model, mode="deploy")
    optimizers = [torch.optim.SGD(each.parameters(), lr=1e-2) for each in (model, reference)]
    for _ in range(3):
        assert difference(deployed(X), reference(X)) <= 1e-10
        with torch.enable_grad():
            for function, optimizer in zip((tuned, reference), optimizers, strict=True):
                function(X).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    assert difference(deployed(X), reference(X)) <= 1e-10


def test_several_threads():
    model = net()
    deployed = compiled(model, mode="deploy")
    deployed(X)
    step(model)
    found = []

    def call():
        with torch.no_grad():
            found.extend(deployed(X) for _ in range(10))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 40
    assert all(difference(each, model(X)) <= 1e-12 for each in found)


def test_a_graph_that_cannot_be_split_runs_whole(monkeypatch):
    def fail(*_):
        raise RuntimeError("on purpose")

    monkeypatch.setattr(_constants, "constant_nodes", fail)
    monkeypatch.setattr(deploy, "split", fail)
    model = net()
    with pytest.warns(UserWarning, match="could not be split: RuntimeError"), warnings.catch_warnings():
        assert difference(compiled(model, mode="deploy")(X), model(X)) <= 1e-12
    assert not deploy.kept_of(model)
