"""fuse: a module that computes what the model does, has plain layers in it, and exports."""

import copy
import io
import re

import pytest
import torch
from support import difference, randomise
from torch import nn
from torch.nn.utils import parametrizations

import convbn_compile as cb


def images(*shape):
    return torch.randn(shape, dtype=torch.float64)


class Branches(nn.Module):
    """RepVGG's block."""

    def __init__(self, channels=4):
        super().__init__()
        self.three = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.one = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return (self.three(x) + self.one(x) + self.norm(x)).relu()


class Twice(nn.Module):
    """One convolution called twice: with a norm each, and with the same."""

    def __init__(self, norms):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(norms))

    def forward(self, x):
        return self.norms[-1](self.conv(self.norms[0](self.conv(x)).relu()))


class Tied(nn.Module):
    """Reads a folded weight for something else, too."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        weight = self.conv.weight
        return self.norm(self.conv(x)).relu() * weight[0, 0, 0, 0] + weight.exp().sum() + torch.arange(6)


class Product(nn.Module):
    """x @ w + b, as transformers' Conv1D has it."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6))
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        return self.norm(torch.addmm(self.bias, x, self.weight))


class Tokens(nn.Module):
    """A linear layer on [N, L, C] with a norm of its output, a table, a keyword argument and a dict for output."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 3))
        self.layer, self.norm, self.head = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x, *, scale=1.0):
        y = self.layer(x + self.table.tanh())
        return {"scores": self.head(self.norm(y.transpose(1, 2)).transpose(1, 2)) * scale, "rest": [x, 3]}


MODELS = {
    "conv1d": (nn.Sequential(nn.Conv1d(4, 6, 3, stride=2, bias=False), nn.BatchNorm1d(6)), (2, 4, 9), ["Conv1d"]),
    "conv2d": (nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.BatchNorm2d(6)), (2, 4, 6, 6), ["Conv2d"]),
    "conv3d": (nn.Sequential(nn.Conv3d(4, 6, 3, dilation=2), nn.BatchNorm3d(6)), (1, 4, 6, 6, 6), ["Conv3d"]),
    "padding": (
        nn.Sequential(nn.Conv2d(4, 6, 3, padding="same", dilation=2), nn.BatchNorm2d(6)),
        (2, 4, 6, 6),
        ["Conv2d"],
    ),
    "transposed": (
        nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2), nn.BatchNorm2d(6)),
        (2, 4, 5, 5),
        ["ConvTranspose2d"],
    ),
    "linear": (nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)), (3, 4), ["Linear", "Linear"]),
    "product": (Product(), (3, 4), ["Linear"]),
    "branches": (nn.Sequential(Branches(), Branches()), (1, 4, 8, 8), ["Conv2d", "Conv2d"]),
    "twice, two norms": (Twice(2), (1, 4, 6, 6), ["Conv2d", "Conv2d"]),
    "twice, one norm": (Twice(1), (1, 4, 6, 6), ["Conv2d"]),
    "tied": (Tied(), (1, 4, 8, 8), ["Conv2d"]),
    "parametrized": (
        nn.Sequential(parametrizations.weight_norm(nn.Conv2d(4, 6, 3)), nn.BatchNorm2d(6)),
        (1, 4, 6, 6),
        ["Conv2d"],
    ),
}


def shape_of(layer):
    return {name: getattr(layer, name) for name in ("in_channels", "out_channels", "kernel_size", "groups")}


@pytest.mark.parametrize(("model", "shape", "layers"), MODELS.values(), ids=MODELS)
def test_layers(model, shape, layers):
    model, x = randomise(copy.deepcopy(model)).double(), images(*shape)
    with torch.no_grad():
        wanted = model(x)
        fused = cb.fuse(model, x)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()  # it is a copy
        assert difference(fused(x), wanted) <= 1e-10
    found = [type(module).__name__ for module in fused.modules() if list(module.parameters(recurse=False))]
    assert [name for name in found if name not in ("Module", "Fused")] == layers
    for layer in fused.modules():
        if isinstance(layer, nn.modules.conv._ConvNd):
            assert layer.weight.shape == type(layer)(**shape_of(layer)).weight.shape
    assert not fused.report.refused
    assert not re.search("conv|mm|norm", " ".join(str(n.target) for n in fused.graph.nodes if n.op == "call_function"))
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    assert not fused.training


def test_paths_are_the_models():
    fused = cb.fuse(randomise(nn.Sequential(Branches(), nn.Sequential(nn.Conv2d(4, 2, 1)))), torch.randn(1, 4, 6, 6))
    assert sorted(fused.state_dict()) == ["0.three.0.bias", "0.three.0.weight", "1.0.bias", "1.0.weight"]
    assert (fused.report.folded, fused.report.merged) == (3, 1)


def test_the_path_of_a_parametrized_layer():
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(4, 6, 3)), nn.BatchNorm2d(6))
    assert sorted(cb.fuse(randomise(model), torch.randn(1, 4, 6, 6)).state_dict()) == ["0.bias", "0.weight"]


def test_any_arguments_and_outputs():
    model = randomise(Tokens())
    x = torch.randn(2, 5, 3)
    fused = cb.fuse(model, x, kwargs={"scale": torch.tensor(2.0)})
    found, wanted = (each(x, scale=torch.tensor(3.0)) for each in (fused, model))
    torch.testing.assert_close(found, wanted)
    assert [rewrite.kind for rewrite in fused.report.rewrites] == ["batch norm", "affine"]


def test_dynamic_shapes():
    model = randomise(nn.Sequential(Branches(), nn.Flatten(2))).double()
    fused = cb.fuse(model, images(2, 4, 6, 6), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    for batch in (2, 1, 7):
        x = images(batch, 4, 6, 6)
        assert difference(fused(x), model(x)) <= 1e-10


def test_other_sizes_are_an_error():
    fused = cb.fuse(randomise(Branches()), torch.randn(2, 4, 6, 6))
    with pytest.raises(AssertionError, match=r"size\(\)\[0\] == 2"):
        fused(torch.randn(3, 4, 6, 6))


@pytest.fixture(scope="module")
def network():
    """A model with two folds and a merge, its input, what it gives, and it fused for any batch size."""
    torch.manual_seed(0)
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Hardswish(), Branches()))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        return x, model(x), cb.fuse(model, x, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))


def test_exports(network):
    x, wanted, fused = network
    program = torch.export.export(fused, (x,))
    torch.testing.assert_close(program.module()(x), wanted)
    kinds = [node.target for node in program.graph.nodes if "conv" in str(node.target)]
    assert kinds == [torch.ops.aten.conv2d.default] * 2


def test_exports_to_onnx(network):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    x, wanted, fused = network
    file = io.BytesIO()
    torch.onnx.export(fused, (x,), dynamo=True, verbose=False).save(file)
    session = runtime.InferenceSession(file.getvalue())
    (name,) = [given.name for given in session.get_inputs()]
    torch.testing.assert_close(torch.from_numpy(session.run(None, {name: x.numpy()})[0]), wanted)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of the checks of sizes, which are not traced
def test_traces(network):
    x, wanted, fused = network
    traced = torch.jit.trace(fused, (x,))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), wanted)


@pytest.mark.parametrize("backend", ["aot_eager", "convbn_tune"])
def test_compiles(network, backend):
    x, wanted, fused = network
    torch.testing.assert_close(torch.compile(fused, backend=backend)(x), wanted)


def test_is_saved_as_a_state_dict(network):
    x, wanted, fused = network
    file = io.BytesIO()
    torch.save(fused.state_dict(), file)
    file.seek(0)
    other = cb.fuse(randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Hardswish(), Branches())), x)
    other.load_state_dict(torch.load(file))
    torch.testing.assert_close(other(x), wanted)
    torch.testing.assert_close(copy.deepcopy(fused)(x), wanted)


def test_what_is_not_folded_has_a_reason():
    model = randomise(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3))).double()
    x = images(1, 3, 6, 6)
    fused = cb.fuse(model, x)
    assert difference(fused(x), model(x)) <= 1e-10
    assert [refusal.module for refusal in fused.report.refused] == ["0"]


@pytest.mark.parametrize("wrap", [cb.turn_on, lambda model: torch.compile(model, backend="convbn_tune")])
def test_compiled_models(wrap):
    model = randomise(Branches())
    x = torch.randn(1, 4, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(cb.fuse(wrap(model), x)(x), copy.deepcopy(model)._call_impl(x))


class Names(nn.Module):
    """A convolution with the name of Fused's own attribute, one that is called twice, and one named like its double."""

    def __init__(self):
        super().__init__()
        self.report, self.a, self.a_2 = (nn.Conv2d(4, 4, 1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))

    def forward(self, x):
        return (
            self.a_2(self.norms[0](self.a(x)) + self.norms[1](self.a(x)) + self.report(x)) + self.report.bias.exp()[0]
        )


def test_names_that_are_taken():
    model, x = randomise(Names()).double(), images(1, 4, 6, 6)
    fused = cb.fuse(model, x)
    assert difference(fused(x), model(x)) <= 1e-10
    assert torch.equal(fused.a_2.weight, model.a_2.weight)
    assert {name.rpartition(".")[0] for name in fused.state_dict() if "." in name} >= {"a_2", "report_"}


class Cond(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.norm(self.conv(x))
        return torch.cond(y.sum() > 0, lambda y: y.sin(), lambda y: y.cos(), (y,))


def test_graphs_inside():
    model = randomise(Cond()).double()
    x = images(1, 4, 6, 6)
    fused = cb.fuse(model, x)
    assert fused.report.folded == 1
    for sign in (1, -1):
        assert difference(fused(sign * x), model(sign * x)) <= 1e-10


def test_fused_in_inference_mode_has_ordinary_parameters():
    model, x = randomise(Branches()), torch.randn(1, 4, 6, 6)
    with torch.inference_mode():
        fused = cb.fuse(model, x.clone())
    x.requires_grad_()
    fused(x).sum().backward()
    assert x.grad is not None


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        return x * self.calls


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


REFUSED = [
    (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
        ValueError,
        "eval mode, but the model itself",
    ),
    (
        nn.Sequential(nn.BatchNorm2d(3), nn.Dropout()).eval().append(nn.Dropout()),
        ValueError,
        "but 2 is in training",
    ),
    (Counts().eval(), ValueError, "whose forward writes to no buffer, but Counts writes to calls."),
    (Branching().eval(), ValueError, "torch.export can capture with these inputs; Branching it cannot: "),
    ("resnet18", TypeError, "fuse needs a torch.nn.Module, got 'resnet18' (str)."),
]


@pytest.mark.parametrize(("model", "kind", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_refuses(model, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        cb.fuse(model, torch.randn(1, 3, 6, 6))
