"""turn_on, turn_off, freeze_batch_norm, unfreeze_batch_norm: in place, through train(), and back exactly."""

import copy
import io
import pickle
import re
import warnings

import pytest
import torch
from support import counted, relative_errors, run
from torch import nn

import convbn_compile as cb
from convbn_compile import _torch


def net():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Sequential(nn.BatchNorm2d(4)))
    with torch.no_grad():
        for norm in (model[1], model[3][0]):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            norm.weight.normal_()
            norm.bias.normal_()
    return model.double()


def state(model):
    """Everything that tells one model from another."""
    flags = {name: module.training for name, module in model.named_modules()}
    attributes = {name: sorted(module.__dict__) for name, module in model.named_modules()}
    return flags, attributes, list(model.state_dict()), _torch.is_compiled_in_place(model)


@pytest.mark.parametrize("mode", ["tune", "Tune", "eval", "deploy", "train"])
@pytest.mark.parametrize("training", [True, False])
def test_turn_off_restores_exactly(mode, training):
    model = net().train(training)
    model[3].eval()
    before = state(model)
    assert cb.turn_on(model, mode=mode, lowering="aot_eager") is model
    assert list(model.state_dict()) == before[2]
    assert cb.turn_off(model) is model
    assert state(model) == before


def test_turn_on_tunes_through_train():
    model, x = net(), torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    reference = copy.deepcopy(model).eval()
    cb.turn_on(model, lowering="aot_eager").train()
    buffers = copy.deepcopy(dict(model.named_buffers()))
    with counted() as counts:
        errors = relative_errors(run(model, model, x), run(reference, reference, x))
    assert counts.folded == 1
    assert max(errors.values()) <= 1e-8
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def test_frozen_norms_stay_frozen_and_the_rest_does_not():
    model = cb.freeze_batch_norm(nn.Sequential(*net(), nn.Dropout()))
    assert [module.training for module in model.train()] == [True, False, True, True, True]
    assert [module.training for module in model.eval()] == [False] * 5


def test_unfreeze_gives_the_mode_that_was_asked_for():
    model = cb.freeze_batch_norm(net().train())
    cb.unfreeze_batch_norm(model)
    assert model[1].training
    cb.freeze_batch_norm(model)
    model.eval()
    cb.unfreeze_batch_norm(model)
    assert not model[1].training
    assert "train" not in model[1].__dict__


def test_turn_off_leaves_what_freeze_batch_norm_froze():
    model = cb.freeze_batch_norm(net().train(), skip=("3.0",))
    cb.turn_off(cb.turn_on(model, lowering="aot_eager"))
    assert not model.train()[1].training
    assert model[3][0].training


def test_skip():
    model = cb.turn_on(net(), skip=["3.0"], lowering="aot_eager").train()
    assert (model[1].training, model[3][0].training) == (False, True)


@pytest.mark.parametrize("copier", ["pickle", "deepcopy", "torch.save"])
def test_models_that_are_on_pickle_copy_and_save(copier):
    model = cb.turn_on(net(), lowering="aot_eager")
    if copier == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif copier == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert not other.train()[1].training
    assert model[1].train.module is model[1]
    assert other[1].train.module is other[1]
    cb.turn_on(other, lowering="aot_eager")
    x = torch.randn(1, 3, 8, 8).double()
    assert torch.equal(other(x), model(x))
    assert cb.turn_off(other).train()[1].training
    assert not model.train()[1].training


def test_state_dict_loads_into_a_plain_model():
    model, plain = cb.turn_on(net(), lowering="aot_eager"), net()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain[0].weight, model[0].weight)


def test_sync_batch_norm_and_subclasses_freeze():
    class Own(nn.BatchNorm1d):
        pass

    model = cb.freeze_batch_norm(nn.Sequential(nn.SyncBatchNorm(4), Own(4)))
    assert [module.training for module in model.train()] == [False, False]


def without_statistics():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))


def compiled_by_the_user():
    model = net()
    model.compile(backend="eager")
    return model


def traced():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(net(), torch.zeros(1, 3, 8, 8).double())


TORCH_SCRIPT = "does not support TorchScript modules, got a TopLevelTracedModule: pass the module that torch.jit.script"
NOT_A_MODULE = "needs a torch.nn.Module, got"
MESSAGES = [
    (lambda: cb.turn_on(nn.Conv2d(3, 4, 3)), ValueError, "turn_on: Conv2d has no nn.BatchNorm1d/2d/3d"),
    (lambda: cb.freeze_batch_norm(nn.ReLU()), ValueError, "freeze_batch_norm: ReLU has no nn.BatchNorm1d/2d/3d"),
    (lambda: cb.turn_on(cb.turn_on(net())), ValueError, "already compiled, by turn_on. Call turn_off(model) first."),
    (
        lambda: cb.turn_on(compiled_by_the_user()),
        ValueError,
        "by nn.Module.compile(). Call turn_on instead of it; copy.",
    ),
    (lambda: cb.turn_off(net()), ValueError, "not on. Call convbn_compile.turn_on(model) first."),
    (lambda: cb.unfreeze_batch_norm(net()), ValueError, "unfreeze_batch_norm: freeze_batch_norm froze no batch norm"),
    (lambda: cb.unfreeze_batch_norm(cb.turn_on(net())), ValueError, "convbn_compile.turn_off(model) unfreezes."),
    (lambda: cb.turn_on(without_statistics()), ValueError, "1: running_mean is None, so its eval mode would still use"),
    (lambda: cb.turn_on(without_statistics()), ValueError, "track_running_stats=True, or pass skip=('1',)."),
    (lambda: cb.turn_on(net(), skip=["bn"]), ValueError, "skip names 'bn', which is no batch norm of this model."),
    (lambda: cb.turn_on(net(), skip=["bn"]), ValueError, "There are: 1, 3.0."),
    (lambda: cb.turn_on(net(), mode="tun"), ValueError, "Unknown mode 'tun'. Did you mean 'tune'?"),
    (lambda: cb.turn_on(net(), memory_buget=1), ValueError, "Did you mean 'memory_budget'?"),
    (
        lambda: cb.turn_on(net(), fullgraph=True),
        ValueError,
        "'fullgraph' is an argument of torch.compile, not an option",
    ),
    (lambda: cb.turn_on(net(), nonsense_zz=1), ValueError, "Options of convbn_tune: 'mode', 'lowering', "),
    (lambda: cb.turn_off(compiled_by_the_user()), ValueError, "turn_off: the model is not on."),
    (lambda: cb.turn_on("resnet18"), TypeError, f"turn_on {NOT_A_MODULE} 'resnet18' (str)."),
    (lambda: cb.turn_off(3), TypeError, f"turn_off {NOT_A_MODULE} 3 (int)."),
    (lambda: cb.freeze_batch_norm(None), TypeError, f"freeze_batch_norm {NOT_A_MODULE} None (NoneType)."),
    (lambda: cb.explain(None), TypeError, f"explain {NOT_A_MODULE} None (NoneType)."),
    (lambda: cb.turn_on(torch.compile(net())), TypeError, "pass model._orig_mod."),
    (lambda: cb.turn_on(traced()), TypeError, f"turn_on {TORCH_SCRIPT}"),
    (lambda: cb.freeze_batch_norm(traced()), TypeError, f"freeze_batch_norm {TORCH_SCRIPT}"),
    (lambda: cb.explain(traced(), torch.zeros(1)), TypeError, f"explain {TORCH_SCRIPT}"),
    (lambda: cb.scaling_coefficients(traced()), TypeError, f"scaling_coefficients {TORCH_SCRIPT}"),
    (lambda: cb.explain(torch.compile(traced()), torch.zeros(1)), TypeError, f"explain {TORCH_SCRIPT}"),
]


@pytest.mark.parametrize(("call", "kind", "message"), MESSAGES, ids=[message for *_, message in MESSAGES])
def test_messages(call, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        call()


def test_the_copy_that_the_message_advises_can_be_turned_on():
    assert _torch.is_compiled_in_place(cb.turn_on(copy.deepcopy(compiled_by_the_user())))


def test_a_refused_turn_on_changes_nothing():
    model = nn.Sequential(*net(), nn.BatchNorm2d(4, track_running_stats=False))
    before = state(model)
    for options in ({}, {"skip": ["4"], "memory_budget": 2}):
        with pytest.raises(ValueError, match="running_mean is None|memory_budget"):
            cb.turn_on(model, **options)
    assert state(model) == before


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = net()

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("make", [net, Own, lambda: nn.Sequential(Own()), lambda: nn.Sequential(nn.Sequential(net()))])
def test_every_kind_of_module_is_compiled(make):
    """nn.Module.compile() alone does nothing for an nn.Sequential of torch's own modules (torch 2.13)."""
    with counted() as counts:
        cb.turn_on(make(), lowering="aot_eager")(torch.randn(1, 3, 8, 8).double())
    assert (counts.graphs, counts.folded) == (1, 1)


def test_graph_modules_are_compiled():
    model = torch.fx.symbolic_trace(net())
    with counted() as counts:
        cb.turn_on(model, lowering="aot_eager")(torch.randn(1, 3, 8, 8).double())
    assert counts.folded == 1


@pytest.mark.parametrize("preset", ["reduce-overhead", "default"])
def test_presets_mean_tune(preset):
    with counted() as counts:
        cb.turn_on(net(), mode=preset)(torch.randn(1, 3, 8, 8).double()).sum().backward()
    assert counts.folded == 1


def test_a_model_inside_a_model_stays_on():
    inner = net()
    outer = nn.Sequential(inner)
    cb.turn_on(inner)
    cb.turn_off(cb.turn_on(outer))
    assert not outer.train()[0][1].training
    assert cb.turn_off(inner).train()[1].training


def test_frozen_after_turn_on_is_frozen_after_turn_off():
    model = cb.freeze_batch_norm(cb.turn_on(net()))
    assert not cb.turn_off(model).train()[1].training
    assert cb.unfreeze_batch_norm(model)[1].training


def test_a_copy_can_be_turned_on_and_off():
    model = cb.turn_on(net())
    copied = cb.turn_on(copy.deepcopy(model))
    assert cb.turn_off(copied)[1].training
    assert not model.train()[1].training


class AlwaysEval(nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train(False)


def test_a_norm_with_a_train_of_its_own_keeps_it():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), AlwaysEval(4).eval(), nn.BatchNorm2d(4))
    cb.turn_off(cb.turn_on(model).train())
    assert [model[1].training, model[2].training] == [False, True]


def test_skip_takes_any_path_of_a_shared_norm():
    norm = nn.BatchNorm2d(4)
    model = nn.ModuleDict({"a": norm, "b": norm, "c": nn.BatchNorm2d(4)})
    cb.freeze_batch_norm(model, skip=["b"]).train()
    assert [norm.training, model["c"].training] == [True, False]
