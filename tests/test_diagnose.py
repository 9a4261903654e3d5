"""scaling_coefficients: the scale of every kind of norm, and the learning rates that follow for Deploy; plots."""

import copy
import json
import math
import sys

import pytest
import torch
from matplotlib.backend_bases import FigureCanvasBase
from support import magnitude, randomise
from test_backend import double
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.ops import FrozenBatchNorm2d

import convbn_compile as cb
from convbn_compile import cli, diagnose
from convbn_compile.scaling import NormScale, ScalingReport


class HandWritten(nn.Module):
    """As transformers' DETR has it: buffers, and eps in the forward."""

    def __init__(self, channels):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


def frozen():
    norm = FrozenBatchNorm2d(4, eps=1e-3)
    norm.load_state_dict({name: torch.rand(4) - 0.5 * (name == "weight") for name in norm.state_dict()})
    return norm


def timms():
    from timm.layers import BatchNormAct2d

    return BatchNormAct2d(4, apply_act=False)


KINDS = {
    "1d": lambda: nn.BatchNorm1d(4, eps=0.1),
    "2d": lambda: nn.BatchNorm2d(4),
    "3d": lambda: nn.BatchNorm3d(4),
    "sync": lambda: nn.SyncBatchNorm(4),
    "not affine": lambda: nn.BatchNorm2d(4, affine=False, eps=0.5),
    "bfloat16": lambda: nn.BatchNorm2d(4).bfloat16(),
    "torchvision": frozen,
    "timm": timms,
    "by hand": lambda: HandWritten(4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_is_what_the_norm_multiplies_by(kind):
    norm = randomise(KINDS[kind]())
    x = torch.zeros(2, 4, *(1,) * (int(kind[0]) if kind[0].isdigit() else 2))
    exact = copy.deepcopy(norm).double()
    slope = (exact(x.double() + 1) - exact(x.double()))[0].flatten().abs()
    [scale] = cb.scaling_coefficients(nn.ModuleDict({"norm": norm})).norms
    assert scale.module == "norm"
    assert torch.allclose(torch.tensor(scale.values).double(), slope, rtol=1e-7)


def test_norms_without_a_scale_are_listed_with_the_reason():
    batch, broken = nn.BatchNorm2d(4, track_running_stats=False), randomise(nn.BatchNorm2d(4))
    broken.running_var[2] = -1
    with torch.device("meta"):
        meta, half = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    half.running_var = torch.ones(4)
    empty, unset = nn.BatchNorm2d(0), nn.BatchNorm2d(4, eps=None)
    others = nn.InstanceNorm2d(4), nn.Conv2d(4, 4, 1)
    model = nn.Sequential(batch, nn.LazyBatchNorm2d(), meta, broken, half, empty, unset, *others)
    report = cb.scaling_coefficients(model)
    assert not report.norms
    assert [(item.module, item.reason.split(":")[0]) for item in report.without] == [
        ("0", "it has no running statistics (track_running_stats=False), so its scale is another one for each batch"),
        ("1", "it is not initialised yet"),
        ("2", "its values are not loaded (meta device)"),
        ("3", "its weight or running_var holds values that give no finite scale"),
        ("4", "its values are not loaded (meta device)"),
        ("5", "it has no channels"),
        ("6", "its eps is None, not a number"),
    ]
    assert report.summary().startswith("0 norms with running statistics; 2 left out: its values are not loaded")
    assert report.to_dict()["all"] is None


def scaled(*scales):
    """A norm of given scales, half of them negative."""
    norm = nn.BatchNorm2d(len(scales), eps=0)
    with torch.no_grad():
        norm.running_var.uniform_(0.5, 2)
        norm.weight.copy_(torch.tensor(scales) * norm.running_var.sqrt())
        norm.weight[::2] *= -1
    return norm


def test_figures_table_and_json():
    model = nn.Sequential(nn.Sequential(scaled(0.05, 0.5, 2, 20, 0), scaled(1, 1)), scaled(4))
    report = cb.scaling_coefficients(torch.compile(model))
    first = report.norms[0]
    assert (first.channels, first.below, first.above, first.zero) == (5, 2, 1, 1)
    assert (first.min, first.median, first.max) == pytest.approx((0, 0.5, 20))
    assert first.sgd_rates == pytest.approx((1 / 400, 400))
    assert str(report).splitlines()[2].split() == ["0.0", "5", "0", "0.5", "20", "2", "1", "0.0025", "to", "4e+02"]
    assert report.summary() == (
        "3 norms, 8 channels; scale 0 to 20, median 1; 25.0% below 0.1, 12.5% above 10; 1 of scale 0"
    )
    data = json.loads(json.dumps(report.to_dict()))
    assert [norm["module"] for norm in data["norms"]] == ["0.0", "0.1", "1"]
    assert data["norms"][2] == {
        "module": "1",
        "channels": 1,
        **dict.fromkeys(("min", "median", "max"), pytest.approx(4)),
        **dict.fromkeys(("below", "above", "zero"), 0),
    }
    assert data["all"]["channels"] == 8


def test_what_is_not_a_module():
    with pytest.raises(TypeError, match=r"scaling_coefficients needs a torch.nn.Module, got 3 \(int\)"):
        cb.scaling_coefficients(3)


OPTIMIZERS = {
    "SGD": (lambda groups: torch.optim.SGD(groups, momentum=0.9), 2),
    "Adam": (lambda groups: torch.optim.Adam(groups, eps=0.0), 1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_deploy_trains_like_eval_at_a_rate_over_a_power_of_the_scale(optimizer):
    """Fused and trained at rate r, each channel's weight moves as in Eval at r / s^2 (SGD), r / |s| (Adam)."""
    conv, norm = nn.Conv2d(3, 4, 3, bias=False).double(), scaled(0.1, 0.5, 2, 7).double()
    conv.eval(), norm.eval().requires_grad_(False)
    [scale] = cb.scaling_coefficients(norm).norms
    fused = fuse_conv_bn_eval(conv, norm).requires_grad_()
    make, power = OPTIMIZERS[optimizer]
    channels = [channel[None].detach().clone().requires_grad_() for channel in conv.weight]
    rates = [1e-3 / s**power for s in scale.values]
    evals = make([{"params": [channel], "lr": rate} for channel, rate in zip(channels, rates, strict=True)])
    deploy = make([{"params": [fused.weight], "lr": 1e-3}])
    for _ in range(4):
        x, target = double(2, 3, 6, 6, requires_grad=False), double(2, 4, 4, 4, requires_grad=False)
        outputs = norm(torch.nn.functional.conv2d(x, torch.cat(channels))), fused(x)
        assert magnitude(outputs[0] - outputs[1]) < 1e-10
        for output, steps in zip(outputs, (evals, deploy), strict=True):
            steps.zero_grad()
            (output - target).square().mean().backward()
            steps.step()
    assert magnitude(torch.cat(channels) - conv.weight) > 1e-3  # they moved


def test_what_follows():
    uneven = cb.scaling_coefficients(nn.Sequential(scaled(0.1, 1, 10)))
    assert diagnose.text(uneven).splitlines()[-1] == (
        "SGD in Deploy mode, on folded weights, would train these channels at 0.01 to 1e+02 times Eval's rate, Adam at "
        "0.1 to 10 times. Fine-tune in Tune mode: it has Eval's gradients."
    )
    never = diagnose.text(cb.scaling_coefficients(nn.BatchNorm2d(4)))
    assert never.endswith(
        "would train them at 1 to 1 times Eval's rate. So it is with weights that were never trained."
    )
    for scale, rate, adam in ((0.3, "11", "3.3"), (3.0, "0.11", "0.33")):
        assert diagnose.text(cb.scaling_coefficients(scaled(scale, scale))).splitlines()[-1] == (
            "All channels have nearly the same scale: SGD in Deploy mode, on folded weights, would train them at "
            f"{rate} to {rate} times Eval's rate, Adam at {adam} to {adam} times. There, one learning rate divided by "
            f"{rate}, with Adam by {adam}, suits them all; Tune mode has Eval's gradients and takes Eval's rate."
        )
    assert diagnose.text(ScalingReport()) == "0 norms with running statistics"
    assert diagnose.text(cb.scaling_coefficients(scaled(0, 0))).splitlines()[-1].endswith("2 of scale 0")


def test_norms_of_like_paths_share_a_line():
    model = nn.ModuleDict({"layer1": nn.ModuleList([nn.ModuleDict({"bn": scaled(1, 2)}) for _ in range(3)])})
    report = cb.scaling_coefficients(model)
    assert diagnose.text(report).splitlines()[2].split()[:5] == ["layer*.*.bn", "(3)", "6", "1", "1.5"]
    assert diagnose.text(report, every=True).splitlines()[4].split()[:3] == ["layer1.2.bn", "2", "1"]


@pytest.fixture
def model(tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef net():\n"
        "    net = nn.ModuleDict({'first': nn.BatchNorm2d(3), 'off': nn.BatchNorm2d(2), 'on': nn.BatchNorm2d(2)})\n"
        "    for norm, scale in zip(net.values(), (0.02, 0.0, 3.0)): nn.init.constant_(norm.weight, scale)\n"
        "    return net.requires_grad_(False)\n"
    )
    return f"{tmp_path / 'net.py'}:net"


def test_the_command_prints_json_and_plots(model, tmp_path, capsys, monkeypatch):
    drawn = []
    ranges = diagnose._ranges
    monkeypatch.setattr(diagnose, "_ranges", lambda axes, rows: (ranges(axes, rows), drawn.append(axes)))
    assert cli.main(["diagnose", model, "--json", "--plot", str(tmp_path / "scales.png")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["all"]["zero"] == 2
    assert (tmp_path / "scales.png").read_bytes().startswith(b"\x89PNG")
    [axes] = drawn
    assert [label.get_text() for label in axes.get_yticklabels()] == ["first", "on"]
    assert axes.get_xscale() == "log"
    assert "2 channels of scale 0 not shown" in axes.get_xlabel()
    heights = [bar.get_height() for bar in axes.figure.axes[0].patches if bar.get_height() > 1]
    assert heights == [3, 2]


def test_many_norms_share_lines_in_the_plot(tmp_path):
    norms = tuple(NormScale(f"layer{index}.bn", (1.0, 2.0)) for index in range(diagnose.MOST_LINES + 1))
    diagnose.plot(ScalingReport(norms), tmp_path / "scales.svg")
    assert (tmp_path / "scales.svg").read_text().count('id="line2d_') < 100


def test_plots_that_cannot_be(model, tmp_path, capsys, monkeypatch):
    with pytest.raises(ValueError, match="nothing to plot"):
        diagnose.plot(cb.scaling_coefficients(scaled(0, 0)), tmp_path / "scales.png")
    assert set(diagnose.FORMATS) <= {f".{name}" for name in FigureCanvasBase.filetypes}
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef off():\n"
        "    norm = nn.BatchNorm2d(3)\n    nn.init.zeros_(norm.weight)\n    return norm\n"
    )
    for callable_, first in (("off", "norm"), ("nn.ReLU", "0 norms with running statistics")):
        cli.main(["diagnose", f"{tmp_path / 'net.py'}:{callable_}", "--plot", str(tmp_path / "scales.png")])
        out, err = capsys.readouterr()
        assert out.startswith(first)
        assert err == f"{tmp_path / 'scales.png'} was not written: no norm has a scale above 0.\n"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["diagnose", model, "--plot", str(tmp_path / "scales.png")]) == 3
    out, err = capsys.readouterr()
    assert err == (
        "convbn-compile: This needs matplotlib, which is not installed: pip install 'convbn-compile[bench]'\n"
    )
    assert not out


def test_random_weights_are_pointed_out(capsys):
    assert cli.main(["diagnose", "timm:test_resnet"]) == 0
    out, err = capsys.readouterr()
    assert "These weights are random" in err
    assert math.isclose(float(out.splitlines()[2].split()[3]), 1, rel_tol=0.01)
