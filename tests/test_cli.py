"""The command line: what it prints, exit codes, errors that say what to do; models by name."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torch import nn

import convbn_compile as cb
from convbn_compile import cli, models
from convbn_compile._extras import require

ROOT = Path(__file__).parents[1]

FILE = """
import atexit, os

import torch
from torch import nn
from sibling import WIDTH

def block(width):
    return nn.Sequential(nn.Conv2d(width, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU())

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(*(block(WIDTH) for _ in range(3)), nn.BatchNorm2d(WIDTH))
        print("made")

class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.net = nn.Embedding(2, WIDTH), block(WIDTH)
    def forward(self, *, tokens, scale):
        return self.net(self.embedding(tokens)[..., None].transpose(1, 2) * scale)

def nothing():
    return nn.Conv2d(4, 4, 1)

def broken():
    raise RuntimeError("no such luck")

def pending():
    import is_not_there

def chatty():
    os.write(1, b"past sys.stdout")
    atexit.register(os.write, 1, b"at exit")
    return nn.ModuleDict({"\u00e9": Net()})

def child():
    return nn.ModuleDict({"module": nn.Conv2d(4, 4, 1)})

class Stops(nn.Module):
    def forward(self, x):
        raise SystemExit("no more")

class Text(Stops):
    main_input_name = "input_ids"

ready = Net().requires_grad_(False)
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Makes a model's name of the name of a callable."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "sibling", raising=False)
    (tmp_path / "sibling.py").write_text("WIDTH = 4\n")
    (tmp_path / "nets.py").write_text(FILE)
    return lambda name: f"{tmp_path / 'nets.py'}:{name}"


def test_explain_prints_a_table_and_one_line(file, capsys):
    assert cli.main(["explain", file("Net"), "--input", "2,4,8,8"]) == 0
    out, err = capsys.readouterr()
    rows = [line.split(maxsplit=5) for line in out.splitlines()]
    assert rows[2] == ["*.1", "3", "batch", "norm", "folded"]
    assert rows[3][:2] == ["3", "1"]
    assert rows[3][-1] == "alone  its input comes from aten.relu, not from a convolution or linear layer"
    assert out.splitlines()[4:5] == [""]
    assert out.splitlines()[5].startswith("folded 3 of 4 norms; saved for backward 0.01 MiB -> ")
    assert len(rows) == 6
    assert "made" not in out
    assert "made" in err


def test_explain_as_json_is_the_report(file, capsys):
    assert cli.main(["explain", file("Net"), "--input", "2,4,8,8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["mode"], found["inputs"], found["model"]) == ("tune", ["2,4,8,8"], file("Net"))
    assert cb.Report.from_dict(found) == cb.explain(models.load_model(file("Net")), torch.randn(2, 4, 8, 8))


def test_explain_deploy_takes_no_gradients_and_all_has_a_line_for_each(file, capsys):
    assert cli.main(["explain", file("Net"), "--input", "2,4,8,8", "--mode", "deploy", "--all"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[2:6]] == ["0.1", "1.1", "2.1", "3"]
    assert "saved" not in out


def test_inputs_by_name_and_of_other_dtypes(file, capsys):
    arguments = ["--input", "scale=1", "--input", "tokens=2,5:int64", "--json"]
    assert cli.main(["explain", file("Named"), *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["inputs"] == ["scale=1", "tokens=2,5:int64"]


def test_code_1_if_there_is_nothing(file, capsys):
    assert cli.main(["explain", file("nothing"), "--input", "2,4,8,8"]) == 1
    assert capsys.readouterr().out == "folded 0 of 0 norms; saved for backward 0.00 MiB -> 0.00 MiB\n"
    assert cli.main(["diagnose", file("nothing")]) == 1
    assert capsys.readouterr().out == "0 norms with running statistics\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "resnet18"], "'resnet18' names no model. Known forms: timm:NAME"),
        (["explain", "timm:"], "'timm:' names no model"),
        (["explain", "nets.py"], "'nets.py' names no model"),
        (["explain", "timm:resnet18", "--input", "4x3"], "'4x3' is not of the form"),
        (["explain", "timm:resnet18", "--input", "4,3:int63"], "'int63' is no dtype of torch"),
        (["explain", "FILE:Net"], "say what it is called with, such as --input 4,3,224,224"),
        (["explain", "FILE:Text"], "say what it is called with, such as --input input_ids=2,16:int64"),
        (["diagnose", "FILE:Net", "--plot", "scales"], "'scales' does not end in .png, .svg, .pdf"),
        (["diagnose", "FILE:Net", "--plot", "no/such/scales.png"], "'no/such/scales.png': there is no folder no/such"),
        (["explain", "timm:resnet18", "--mode", "train"], "invalid choice: 'train'"),
        ([], "required: COMMAND"),
    ],
)
def test_code_2_for_wrong_usage(file, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([file(argument[5:]) if argument.startswith("FILE:") else argument for argument in arguments])
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert message in err
    assert not out


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("timm:resnt18", "timm has no model 'resnt18'. Did you mean 'resnet18'?"),
        ("torchvision:resnet81", "torchvision has no model 'resnet81'. Did you mean 'resnet18'?"),
        ("transformers:ResNetModle", "transformers has no model 'ResNetModle'. Did you mean 'ResNetModel'?"),
        ("transformers:AutoModel", "a class with a configuration of its own is needed"),
        ("transformers:PreTrainedModel", "a class with a configuration of its own is needed"),
        ("transformers:pipeline", "a class with a configuration of its own is needed"),
        ("no/such/nets.py:Net", "there is no file no/such/nets.py"),
        ("broken", "it could not be made: RuntimeError: no such luck"),
        ("missing", "AttributeError: module '_model_of_nets' has no attribute 'missing'"),
        ("pending", "nets.py:pending: it could not be made: ModuleNotFoundError: No module named 'is_not_there'"),
        ("WIDTH", "'int' object is not callable"),
        ("block", "missing 1 required positional argument: 'width'"),
        ("torch.get_default_dtype", "a torch.nn.Module is needed, got torch.float32 (dtype)"),
    ],
)
def test_code_3_if_the_model_cannot_be_made(file, model, message, capsys):
    model = model if ":" in model else file(model)
    assert cli.main(["diagnose", model, "--json"]) == 3
    out, err = capsys.readouterr()
    assert message in err
    assert not out
    assert len(err.splitlines()) < 10


def test_code_3_if_it_cannot_be_run_says_what_the_model_says(file, capsys):
    assert cli.main(["explain", file("Net"), "--input", "2,3,8,8"]) == 3
    err = capsys.readouterr().err
    assert "could not be run with 2,3,8,8: RuntimeError: Given groups=1, weight of size [4, 4, 3, 3], expected" in err
    assert "Traceback" not in err
    assert cli.main(["explain", file("Net"), "--input", "2,3,8,8", "--traceback"]) == 3
    assert "Traceback" in capsys.readouterr().err
    assert cli.main(["explain", file("Stops"), "--input", "2"]) == 3
    assert capsys.readouterr().err.endswith("convbn-compile: it could not be run with 2: SystemExit: no more\n")


def test_weights_that_cannot_be_downloaded(monkeypatch, capsys):
    def offline(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    assert cli.main(["diagnose", "torchvision:squeezenet1_0", "--pretrained"]) == 3
    assert "its weights could not be loaded: URLError: <urlopen error no network>" in capsys.readouterr().err
    assert cli.main(["diagnose", "transformers:ResNetModel", "--pretrained"]) == 3
    assert "a class has no weights" in capsys.readouterr().err


@pytest.mark.parametrize("library", ["timm", "torchvision", "transformers"])
def test_a_missing_package_is_named_with_its_extra(library, monkeypatch, capsys):
    monkeypatch.setattr(models, "declare_torchvision_operators", lambda: None)
    monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
    assert cli.main(["diagnose", f"{library}:resnet18"]) == 3
    assert capsys.readouterr().err == (
        f"convbn-compile: This needs {library}, which is not installed: pip install 'convbn-compile[zoo]'\n"
    )


def test_require_names_what_is_missing_inside(tmp_path, monkeypatch):
    (tmp_path / "needs_another.py").write_text("import another_one.part")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match=r"needs another_one, .* 'convbn-compile\[bench\]'"):
        require("needs_another", extra="bench")


@pytest.mark.parametrize(
    "name",
    ["timm:test_resnet", "torchvision:lraspp_mobilenet_v3_large", "transformers:ResNetConfig", "transformers:DIR"],
)
def test_models_of_libraries_and_their_default_inputs(name, tmp_path):
    if name == "transformers:DIR":
        import transformers

        transformers.MobileNetV2Config(image_size=48, depth_multiplier=0.25).save_pretrained(tmp_path)
        name = f"transformers:{tmp_path}"
    model = models.load_model(name)
    assert not model.training
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    [(argument, shape)] = models.default_shapes(name, model, batch=1).items()
    x = torch.zeros(shape)
    assert x.shape[-1] == {"timm:test_resnet": 160, f"transformers:{tmp_path}": 48}.get(name, 224)
    with torch.no_grad():
        model(**{argument: x}) if argument else model(x)


def test_a_module_and_a_frozen_one_are_taken_as_they_are(file):
    model = models.load_model(file("ready"))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert models.default_shapes(file("ready"), model) == {}


@pytest.mark.parametrize("wrapped", [lambda state: state, lambda state: {"state_dict": state, "epoch": 3}])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_checkpoint_of_torch(file, wrapped, prefix, tmp_path):
    state = {prefix + key: torch.rand_like(value.double()) for key, value in _state(file).items()}
    torch.save(wrapped(state), tmp_path / "weights.pt")
    _check_loaded(file, tmp_path / "weights.pt", {key.removeprefix(prefix): value for key, value in state.items()})


@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoint_of_a_model_with_a_child_called_module(file, prefix, tmp_path):
    state = models.load_model(file("child")).state_dict()
    torch.save({prefix + key: value for key, value in state.items()}, tmp_path / "weights.pt")
    loaded = models.load_model(file("child"), checkpoint=tmp_path / "weights.pt")
    assert torch.equal(loaded["module"].weight, state["module.weight"])


@pytest.mark.parametrize(
    "saved",
    [[1, 2], nn.ReLU(), {"model": {}, "args": Namespace(lr=1)}, {"epoch": 3}, {3: torch.zeros(1)}, torch.zeros(1)],
    ids=lambda saved: type(saved).__name__,
)
def test_a_file_without_a_state_dict(file, saved, tmp_path, capsys):
    torch.save(saved, tmp_path / "weights.pt")
    assert cli.main(["diagnose", file("Net"), "--checkpoint", str(tmp_path / "weights.pt")]) == 3
    [message] = [line for line in capsys.readouterr().err.splitlines() if line != "made"]
    assert f"{tmp_path / 'weights.pt'}: is no state_dict" in message


def test_checkpoint_of_safetensors_and_of_another_model(file, tmp_path, capsys):
    from safetensors.torch import save_file

    state = {key: torch.rand_like(value.double()) for key, value in _state(file).items()}
    save_file(state, tmp_path / "weights.safetensors")
    _check_loaded(file, tmp_path / "weights.safetensors", state)
    assert cli.main(["diagnose", file("nothing"), "--checkpoint", str(tmp_path / "weights.safetensors")]) == 3
    assert "its weights could not be loaded: RuntimeError: Error(s) in loading state_dict" in capsys.readouterr().err


def _state(file):
    return models.load_model(file("Net")).state_dict()


def _check_loaded(file, checkpoint, state):
    loaded = models.load_model(file("Net"), checkpoint=checkpoint).state_dict()
    assert set(loaded) == set(state)
    assert all(torch.equal(value, state[key].to(value.dtype)) for key, value in loaded.items())


def test_likenesses_share_a_line_and_long_reasons_wrap():
    refused = [cb.Refusal(f"layers.{index}.norm", f"its weight is {index} times as large") for index in (9, 12)]
    report = cb.Report(refused=(*refused, cb.Refusal("stem", "other", "affine")), merged=2)
    lines = [" ".join(line.split()) for line in cli.explained(report).splitlines()]
    assert lines[2] == "layers.*.norm 2 batch norm left alone its weight is 9 to 12 times as large"
    assert lines[3] == "stem 1 affine left alone other"
    assert lines[-1] == report.totals() == "folded 0 of 3 norms; merged away 2 convolutions"
    narrow = cli.explained(report, every=True, width=68).splitlines()
    assert [line.split()[0] for line in narrow[2:7]] == ["layers.9.norm", "large", "layers.12.norm", "large", "stem"]
    assert max(map(len, narrow)) <= 68


def test_a_reader_that_has_seen_enough(file, monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli.main(["diagnose", file("Net")]) == 0
    assert "convbn-compile" not in capsys.readouterr().err


def test_help_has_examples_that_parse(capsys):
    for name, command in cli.COMMANDS.items():
        with pytest.raises(SystemExit) as stopped:
            cli.main([name, "--help"])
        assert stopped.value.code == 0
        assert "examples:" in capsys.readouterr().out
        for example in command.examples:
            cli.make_parser().parse_args([name, *example.split()])


def test_the_command_is_installed_and_is_a_module_that_imports_no_library(file):
    assert 'convbn-compile = "convbn_compile.cli:main"' in (ROOT / "pyproject.toml").read_text()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "convbn_compile", "diagnose", file("chatty"), "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["all"]["channels"] == 16
    assert "past sys.stdout" in done.stderr
    assert "at exit" in done.stderr
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "convbn_compile" in imported
    assert not imported & {"timm", "torchvision", "transformers", "matplotlib", "safetensors"}


def test_the_command_with_stderr_closed_and_stdout_in_ascii(file):
    script = Path(sys.executable).with_name("convbn-compile")
    command = [script] if script.exists() else [sys.executable, "-m", "convbn_compile"]
    done = subprocess.run(
        [*command, "diagnose", file("chatty"), "--all"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"},
        stdout=subprocess.PIPE,
        preexec_fn=lambda: os.close(2),
        text=True,
        check=False,
    )
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0].split()[0] == "norm"
    assert lines[2].split()[0] == "\\xe9.0.1"
    assert lines[-1].startswith("All channels have nearly the same scale")


def test_operators_are_declared_only_where_torchvision_is_there_and_wants_them(monkeypatch):
    defined = []
    monkeypatch.setattr(torch.library, "define", lambda *args: defined.append(args))
    models.declare_torchvision_operators()
    monkeypatch.setitem(sys.modules, "torchvision", None)
    models.declare_torchvision_operators()
    assert not defined
