"""patch_inductor: plain Inductor tunes where it is patched, is its own where it is not, and nothing is left behind."""

import copy
import io
import os
import pickle
import re
from unittest.mock import Mock

import pytest
import torch
from support import counted, randomise, relative_errors, run
from torch import nn

import convbn_compile as cb
from convbn_compile import _torch

AOT = {"lowering": "aot_eager"}


@pytest.fixture(autouse=True)
def _nothing_is_left_behind():
    before = torch._TorchCompileInductorWrapper
    yield
    assert torch._TorchCompileInductorWrapper is before


class Net(nn.Module):
    """forward() is a frame of our own: nn.Module.compile() does nothing to torch.nn's, whatever the backend."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x):
        return self.layers(x)


def net():
    return randomise(Net().double())


def images():
    return torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)


def in_place(model):
    model.compile()
    return model


def decorated(model):
    @torch.compile
    def call(x):
        return model(x)

    return call


def decorated_with_arguments(model):
    @torch.compile(backend="inductor", dynamic=False)
    def call(x):
        return model(x)

    return call


WAYS = {
    "torch.compile(model)": torch.compile,
    "by name": lambda model: torch.compile(model, backend="inductor"),
    "model.compile()": in_place,
    "decorator": decorated,
    "decorator with arguments": decorated_with_arguments,
}


def folded(function, x=None):
    """How many pairs are folded when a compiled function is called for the first time."""
    with counted() as counts:
        function(images() if x is None else x)
    assert counts.graphs <= 1, "our own lowering was redirected to us"
    return counts.folded


@pytest.fixture
def inductor(monkeypatch):
    """Inductor, asked for its configuration only: what the plain wrapper hands it, without code generation."""
    asked = Mock(side_effect=lambda gm, inputs, **kwargs: gm.forward)
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", asked)
    return asked


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_way_to_compile_tunes_with_eagers_gradients(way):
    model, x = net(), images()
    eager = copy.deepcopy(model)
    wanted = run(eager, eager, x)
    with cb.inductor_patched(**AOT):
        function = way(model)
    with counted() as counts:
        found = run(function, model, x)
    assert (counts.graphs, counts.folded) == (1, 1)
    assert max(relative_errors(found, wanted).values()) <= 1e-10


def test_code_generation():
    """Through Inductor itself, which our backend calls: not redirected to us once more."""
    model, x = net(), images()
    eager = copy.deepcopy(model)
    with cb.inductor_patched(), counted() as counts:
        found = run(torch.compile(model, mode="reduce-overhead"), model, x)
    assert (counts.graphs, counts.folded) == (1, 1)
    assert max(relative_errors(found, run(eager, eager, x)).values()) <= 1e-10


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_after_undo_inductor_is_its_own(way, inductor):
    cb.patch_inductor(**AOT)
    cb.unpatch_inductor()
    assert folded(way(net())) == 0
    assert inductor.call_count == 1


def test_a_model_keeps_what_it_was_compiled_with(inductor):
    """torch.compile decides at its own call, not at the first call of what it returns."""
    plain = torch.compile(net())
    with cb.inductor_patched(**AOT):
        tuned = torch.compile(net())
        assert folded(plain) == 0
    assert inductor.call_count == 1
    assert folded(tuned) == 1
    assert folded(tuned, torch.randn(1, 3, 9, 9).double()) == 1  # compiled anew, long after the patch
    assert inductor.call_count == 1


def test_plain_and_tuned_code_of_one_model_are_kept_apart(inductor):
    """Dynamo keeps compiled code with the function, and reuses it where backends are equal."""
    model, x = net(), images()
    plain = torch.compile(model)
    with cb.inductor_patched(**AOT):
        first, second = torch.compile(model), torch.compile(model)
    with cb.inductor_patched(**AOT, memory_budget=0.5):
        other = torch.compile(model)
    assert [folded(function, x) for function in (plain, first, second, other, plain, first)] == [0, 1, 0, 1, 0, 0]
    assert inductor.call_count == 1


def test_what_was_compiled_can_be_saved_and_runs_where_nothing_is_patched():
    model, x, file = net(), images(), io.BytesIO()
    with cb.inductor_patched(**AOT, memory_budget=0.5):
        torch.save(torch.compile(model), file)
        tuned = wrapper()
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert folded(loaded, x) == 1
    again = pickle.loads(pickle.dumps(tuned))
    assert again == tuned
    assert again != wrapper()


def wrapper():
    return torch._TorchCompileInductorWrapper("default", None, None)


def test_plain_wrappers_are_equal_while_patched():
    plain = [torch._TorchCompileInductorWrapper("default", None, None) for _ in range(2)]
    with cb.inductor_patched():
        tuned = torch._TorchCompileInductorWrapper("default", None, None)
        assert plain[0] == plain[1]
        assert isinstance(plain[0], torch._TorchCompileInductorWrapper)
        assert plain[0] != tuned
        assert tuned != plain[0]


def test_nested():
    seen = []
    with cb.inductor_patched(memory_budget=0.5):
        seen.append(options_of_a_compile())
        with cb.inductor_patched(mode="eval"):
            seen.append(options_of_a_compile())
        seen.append(options_of_a_compile())
    assert [(options.mode.value, options.memory_budget) for options in seen] == [
        ("tune", 0.5),
        ("eval", 1.0),
        ("tune", 0.5),
    ]


def test_contexts_that_overlap_without_nesting():
    first, second = cb.inductor_patched(memory_budget=0.5), cb.inductor_patched(memory_budget=0.25)
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert options_of_a_compile().memory_budget == 0.25
    second.__exit__(None, None, None)
    assert not _torch.is_inductor_redirected()


def test_a_patch_inside_a_context_ends_with_it():
    with cb.inductor_patched(memory_budget=0.5):
        with cb.inductor_patched():
            cb.patch_inductor(memory_budget=0.25)
            cb.patch_inductor(memory_budget=0.125)
            assert options_of_a_compile().memory_budget == 0.125
        assert options_of_a_compile().memory_budget == 0.5
    assert not _torch.is_inductor_redirected()


def test_torch_sees_the_presets_of_the_patch(monkeypatch):
    """With CUDA graphs it turns something off in the profiler of old CUDA."""
    monkeypatch.setattr("torch.version.cuda", "12.0")
    for name in ("DISABLE_CUPTI_LAZY_REINIT", "TEARDOWN_CUPTI"):
        monkeypatch.setenv(name, "unset")
    with cb.inductor_patched(mode="reduce-overhead"):
        wrapper()
    assert (os.environ["DISABLE_CUPTI_LAZY_REINIT"], os.environ["TEARDOWN_CUPTI"]) == ("1", "0")


def test_patched_twice_the_last_options_hold_and_one_undo_undoes_all():
    cb.patch_inductor(memory_budget=0.5)
    cb.patch_inductor(memory_budget=0.25)
    assert options_of_a_compile().memory_budget == 0.25
    cb.unpatch_inductor()
    assert not _torch.is_inductor_redirected()


def test_inductor_patched_restores_an_outer_patch_also_after_an_error():
    cb.patch_inductor(memory_budget=0.5)
    with pytest.raises(KeyError), cb.inductor_patched():
        raise KeyError
    with cb.inductor_patched():
        cb.unpatch_inductor()
        assert not _torch.is_inductor_redirected()
    assert options_of_a_compile().memory_budget == 0.5
    cb.unpatch_inductor()


def test_what_somebody_else_put_there_comes_back(monkeypatch):
    class Theirs(torch._TorchCompileInductorWrapper):
        pass

    with monkeypatch.context() as patch:
        patch.setattr(torch, "_TorchCompileInductorWrapper", Theirs)
        cb.patch_inductor()
        cb.patch_inductor()
        cb.unpatch_inductor()
        assert torch._TorchCompileInductorWrapper is Theirs


def options_of_a_compile(**compile_arguments):
    """The options that our backend gets when torch.compile is called now; nothing is compiled."""
    wrapper = torch._TorchCompileInductorWrapper(
        compile_arguments.get("mode", "default"), compile_arguments.get("options"), None
    )
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("convbn_compile.patch.compile_graph", lambda gm, inputs, options: seen.append(options))
        wrapper(None, [])
    return seen[0]


def test_presets_and_keys_of_a_call_go_before_those_of_the_patch():
    with cb.inductor_patched(mode="max-autotune-no-cudagraphs", epilogue_fusion=False, memory_budget=0.5):
        default = options_of_a_compile()
        preset = options_of_a_compile(mode="reduce-overhead")
        keys = options_of_a_compile(mode=None, options={"max_autotune": False, "epilogue_fusion": True})
    assert default.inductor == {"max_autotune": True, "coordinate_descent_tuning": True, "epilogue_fusion": False}
    assert preset.inductor == {**default.inductor, **_torch.inductor_presets()["reduce-overhead"]}
    assert keys.inductor == {"max_autotune": False, "coordinate_descent_tuning": True, "epilogue_fusion": True}
    assert {options.memory_budget for options in (default, preset, keys)} == {0.5}


def test_options_of_a_call_reach_inductor(monkeypatch):
    called = Mock(side_effect=lambda gm, inputs, **kwargs: gm.forward)
    monkeypatch.setattr(_torch, "compile_fx", called)
    with cb.inductor_patched():
        torch.compile(net(), options={"max_autotune": True})(images())
    (call,) = called.call_args_list
    assert call.kwargs["config_patches"]["max_autotune"] is True
    assert call.kwargs["config_patches"][_torch.USERS_PASS] is not None


def test_other_backends_are_not_patched():
    with cb.inductor_patched(**AOT):
        assert folded(torch.compile(net(), backend="aot_eager")) == 0
        assert folded(torch.compile(net(), backend="convbn_tune", options=AOT)) == 1


MESSAGES = [
    (cb.unpatch_inductor, "unpatch_inductor: Inductor is not patched. Call convbn_compile.patch_inductor() first."),
    (lambda: cb.patch_inductor(mode="tun"), "Unknown mode 'tun'. Did you mean 'tune'?"),
    (lambda: cb.inductor_patched(memory_buget=0.5).__enter__(), "Did you mean 'memory_budget'?"),
]


@pytest.mark.parametrize(("call", "message"), MESSAGES, ids=[message for _, message in MESSAGES])
def test_messages(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_an_unknown_key_of_the_call_is_inductors_error():
    with cb.inductor_patched(), pytest.raises(RuntimeError, match="Unexpected optimization option memory_budget"):
        torch.compile(net(), options={"memory_budget": 0.5})
