"""Options: what is accepted, and every message about what is not."""

import re

import pytest
import torch
from support import compiled, counted
from test_backend import double, pair

from convbn_compile.options import Fold, Lowering, Mode, Options


def test_defaults():
    assert Options.parse() == Options(Mode.TUNE, Lowering.INDUCTOR, 1.0, True, Fold.AUTO, {})


@pytest.mark.parametrize("mode", ["tune", "Tune", "TUNE", Mode.TUNE])
def test_modes_in_any_case(mode):
    assert Options.parse(mode).mode is Mode.TUNE
    assert Options.parse(options={"mode": mode}).mode is Mode.TUNE


@pytest.mark.parametrize("preset", ["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", "default"])
def test_presets_of_inductor_mean_tune_with_that_preset(preset):
    parsed = Options.parse(preset)
    assert parsed.mode is Mode.TUNE
    assert parsed.inductor == torch._inductor.list_mode_options(preset)
    assert Options.parse(options={"mode": preset}) == parsed


def test_unknown_keys_go_to_inductor():
    parsed = Options.parse(options={"max_autotune": True, "triton.cudagraphs": False, "mode": "deploy"})
    assert parsed.inductor == {"max_autotune": True, "triton.cudagraphs": False}
    assert parsed.mode is Mode.DEPLOY


@pytest.mark.parametrize(
    ("mode", "options", "kind", "message"),
    [
        ("tun", None, ValueError, "Unknown mode 'tun'. Did you mean 'tune'?"),
        ("reduce_overhead", None, ValueError, "Unknown mode 'reduce_overhead'. Did you mean 'reduce-overhead'?"),
        (None, {"mode": "fast"}, ValueError, "Unknown mode 'fast'."),
        (None, {"mode": 3}, TypeError, "mode must be a string, one of 'train', 'eval', 'tune', 'deploy'; got 3 (int)."),
        (3, None, TypeError, "mode must be a string, one of 'train', 'eval', 'tune', 'deploy'; got 3 (int)."),
        ("tune", {"mode": "eval"}, ValueError, "mode is given twice: mode='tune' and options['mode']='eval'."),
        (None, {"lowering": "eager"}, ValueError, "Unknown lowering 'eager'. Did you mean 'aot_eager'?"),
        (None, {"lowering": None}, TypeError, "lowering must be a string, one of 'inductor', 'aot_eager'; got None"),
        (None, {"memory_budget": 0}, ValueError, "memory_budget must be a number in (0, 1], or 'pointwise'; got 0."),
        (
            None,
            {"memory_budget": 1.5},
            ValueError,
            "memory_budget must be a number in (0, 1], or 'pointwise'; got 1.5.",
        ),
        (
            None,
            {"memory_budget": float("nan")},
            ValueError,
            "memory_budget must be a number in (0, 1], or 'pointwise'; got nan.",
        ),
        (
            None,
            {"memory_budget": None},
            TypeError,
            "memory_budget must be a number in (0, 1], or 'pointwise'; got None (",
        ),
        (
            None,
            {"memory_budget": "1"},
            ValueError,
            "memory_budget must be a number in (0, 1], or 'pointwise'; got '1'.",
        ),
        (None, {"memory_budget": "pointwize"}, ValueError, "got 'pointwize'. Did you mean 'pointwise'?"),
        (
            None,
            {"memory_budget": True},
            TypeError,
            "memory_budget must be a number in (0, 1], or 'pointwise'; got True (",
        ),
        (None, {"merge_branches": 1}, TypeError, "merge_branches must be True or False, got 1 (int)."),
        (None, {"fold": "allways"}, ValueError, "Unknown fold 'allways'. Did you mean 'always'?"),
        (None, {"fold": True}, TypeError, "fold must be a string, one of 'auto', 'always'; got True (bool)."),
        ("deploy", {"freezing": True}, ValueError, 'mode="deploy" and Inductor\'s freezing exclude each other'),
        (None, {"memory_buget": 0.5}, ValueError, "Did you mean 'memory_budget'?"),
        (
            ["tune"],
            None,
            TypeError,
            "mode must be a string, one of 'train', 'eval', 'tune', 'deploy'; got ['tune'] (list).",
        ),
        (None, {"max_autotun": True}, ValueError, "Did you mean 'max_autotune'?"),
        (None, {3: True}, ValueError, "Unknown option: 3 is neither an option of convbn_tune nor an Inductor"),
        (None, {"max_autotune": 1}, TypeError, "Option 'max_autotune' must be of type bool, got 1 (int)."),
        (None, [("mode", "tune")], TypeError, "options must be a dict, got [('mode', 'tune')] (list)."),
    ],
)
def test_messages(mode, options, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        Options.parse(mode, options)


def test_a_wrong_option_reaches_the_user_of_torch_compile_as_it_is():
    with pytest.raises(ValueError, match=re.escape("Unknown mode 'tun'. Did you mean 'tune'?")):
        compiled(pair(), mode="tun")(double(2, 4, 8, 8))
    with pytest.raises(ValueError, match=re.escape("memory_budget must be a number")):
        compiled(pair(), memory_budget="half")(double(2, 4, 8, 8))


def test_the_backend_is_registered_and_takes_mode():
    assert "convbn_tune" in torch.compiler.list_backends()
    with counted() as counts, torch.no_grad():
        torch.compile(pair(), backend="convbn_tune", mode="deploy")(double(2, 4, 8, 8))
    assert counts.folded == 1


def test_presets_compile():
    with counted() as counts:
        torch.compile(pair(), backend="convbn_tune", mode="reduce-overhead")(double(2, 4, 8, 8)).sum().backward()
    assert counts.folded == 1


@pytest.mark.parametrize("lowering", ["inductor", "aot_eager"])
@pytest.mark.parametrize("where", ["options", "config", "list in config"])
def test_a_users_own_joint_pass_still_runs(where, lowering):
    seen = []

    def users_own(graph):
        seen.append([str(node.target) for node in graph.nodes])

    with counted() as counts:
        if where == "options":
            compiled(pair(), lowering=lowering, joint_custom_pre_pass=users_own)(double(2, 4, 8, 8))
        else:
            value = users_own if where == "config" else [users_own]
            with torch._inductor.config.patch(joint_custom_pre_pass=value):
                compiled(pair(), lowering=lowering)(double(2, 4, 8, 8))
    assert counts.folded == 1
    assert len(seen) == 1
    assert not any("batch_norm" in name for name in seen[0])


def test_inductor_options_without_effect_are_named():
    with pytest.warns(UserWarning, match=re.escape("these Inductor options have no effect: epilogue_fusion, max_auto")):
        compiled(pair(), max_autotune=True, epilogue_fusion=False)(double(2, 4, 8, 8))
