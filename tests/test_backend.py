"""The backend against eager, output and every gradient: what it must fold and what it must leave alone."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from support import assert_as_eager, compiled, counted, randomise, relative_errors, run
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.utils.checkpoint import checkpoint

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def double(*shape, requires_grad=True):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=requires_grad)


def pair(conv=None, norm=None):
    conv = conv or nn.Conv2d(4, 8, 3)
    return randomise(nn.Sequential(conv, norm or nn.BatchNorm2d(8), nn.SiLU()).double())


# --- every convolution -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_every_convolution_folds(rank, transposed, groups, bias):
    settings = {"stride": 2, "padding": 1, "dilation": 2, "groups": groups, "bias": bias}
    if transposed:
        settings["output_padding"] = 1
    conv = (TRANSPOSED if transposed else CONV)[rank](4, 8, 3, **settings)
    assert_as_eager(pair(conv, NORM[rank](8)), double(2, 4, *(9, 8, 7)[:rank]), folded=1)


@pytest.mark.parametrize("padding", ["same", "valid", (1, 2)])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "circular"])
def test_every_padding_folds(padding, padding_mode):
    assert_as_eager(pair(nn.Conv2d(4, 8, 3, padding=padding, padding_mode=padding_mode)), double(2, 4, 9, 8), folded=1)


@pytest.mark.usefixtures("vectorised")
def test_inductor_lowering():
    net = nn.Sequential(pair(), pair(nn.ConvTranspose2d(8, 4, 3, groups=2), nn.BatchNorm2d(4)))
    assert_as_eager(net, double(2, 4, 8, 8), folded=2, lowering="inductor")


# --- batched and unbatched ---------------------------------------------------------------------------------------


class Unbatched(nn.Module):
    """An unbatched convolution, C_out x L, and a norm that takes L for its channels (or C_out, if unsqueezed)."""

    def __init__(self, *, unsqueeze):
        super().__init__()
        self.conv, self.norm, self.unsqueeze = nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), unsqueeze  # L = 8 = C_out

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y.unsqueeze(0) if self.unsqueeze else y)


@pytest.mark.filterwarnings("ignore:convbn_tune folded no batch norm")
def test_unbatched_convolution_whose_channels_are_not_the_norms_is_left_alone():
    model = randomise(Unbatched(unsqueeze=False).double())
    with counted() as counts:
        assert_as_eager(model, double(4, 10), folded=0)
    assert counts.reasons == ["its channels are not the output channels of the convolution before it"]


def test_unbatched_convolution_whose_channels_are_the_norms_folds():
    assert_as_eager(randomise(Unbatched(unsqueeze=True).double()), double(4, 10), folded=1)


# --- every spelling of eval batch norm ---------------------------------------------------------------------------


class Functional(nn.Module):
    """conv, then batch norm in one of the ways in which torch lets one write it."""

    def __init__(self, spelling, *, weight=True, bias=True):
        super().__init__()
        self.conv, self.spelling = nn.Conv2d(4, 8, 3), spelling
        self.weight = nn.Parameter(torch.randn(8)) if weight else None
        self.bias = nn.Parameter(torch.randn(8)) if bias else None
        self.register_buffer("mean", torch.randn(8))
        self.register_buffer("var", torch.rand(8) + 0.5)

    def forward(self, x):
        return self.spelling(self.conv(x), self.mean, self.var, self.weight, self.bias)


SPELLINGS = {
    "F.batch_norm": lambda y, m, v, w, b: F.batch_norm(y, m, v, w, b, eps=0.03),
    "F.batch_norm by keyword": lambda y, m, v, w, b: F.batch_norm(
        input=y, bias=b, weight=w, running_var=v, running_mean=m, training=False, momentum=0.7, eps=1e-7
    ),
    "torch.batch_norm": lambda y, m, v, w, b: torch.batch_norm(y, w, b, m, v, False, 0.1, 0.03, True),
    "torch.native_batch_norm": lambda y, m, v, w, b: torch.native_batch_norm(y, w, b, m, v, False, 0.1, 0.03)[0],
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(("weight", "bias"), [*itertools.product([True, False], repeat=2)])
def test_every_spelling_folds(spelling, weight, bias):
    model = Functional(SPELLINGS[spelling], weight=weight, bias=bias).double().eval()
    assert_as_eager(model, double(2, 4, 8, 8), folded=1)


@pytest.mark.parametrize(
    "norm",
    [
        nn.SyncBatchNorm(8),
        nn.BatchNorm2d(8, affine=False),
        nn.BatchNorm2d(8, eps=0.1, momentum=None),
        nn.LazyBatchNorm2d(),
    ],
    ids=str,
)
def test_every_module_folds(norm):
    model = nn.Sequential(nn.Conv2d(4, 8, 3), norm).eval()
    model(torch.zeros(1, 4, 8, 8))
    assert_as_eager(randomise(model.double()), double(2, 4, 8, 8), folded=1)


# --- gradients of exactly what requires them ---------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:convbn_tune folded no batch norm")
@pytest.mark.parametrize("trained", [*itertools.product([True, False], repeat=5)])
def test_exactly_the_gradients_that_are_required(trained):
    weight, bias, gamma, beta, input = trained
    model = pair()
    leaves = zip((model[0].weight, model[0].bias, model[1].weight, model[1].bias), trained[:4], strict=True)
    for parameter, required in leaves:
        parameter.requires_grad_(required)
    adds_a_convolution = gamma and not weight
    assert_as_eager(model, double(2, 4, 8, 8, requires_grad=input), folded=0 if adds_a_convolution else 1)


def test_nothing_is_computed_that_nobody_needs():
    model = pair().requires_grad_(False)
    model[1].bias.requires_grad_()
    x = double(2, 4, 8, 8, requires_grad=False)
    with counted() as counts, torch.profiler.profile(acc_events=True) as profile:
        compiled(model)(x).sum().backward()
    assert counts.folded == 1
    assert not [event.key for event in profile.key_averages() if "convolution_backward" in event.key]


@pytest.mark.filterwarnings("ignore:convbn_tune folded no batch norm")
def test_frozen_weight_and_trained_gamma_is_left_alone_with_the_cost_as_reason():
    model = pair()
    model[0].weight.requires_grad_(False)
    with counted() as counts:
        assert_as_eager(model, double(2, 4, 8, 8), folded=0)
    assert "would add a convolution" in counts.reasons[0]


# --- sharing -----------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A convolution, two norms and a forward given as a function of the module."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.norm, self.other, self.function = (
            nn.Conv2d(4, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.BatchNorm2d(4),
            function,
        )

    def forward(self, x):
        return self.function(self, x)


def two_norms_of_one_output(net, x):
    y = net.conv(x)
    return net.norm(y) + net.other(y)


def output_read_elsewhere(net, x):
    y = net.conv(x)
    return net.norm(y) * y.sigmoid()


def convolution_twice(net, x):
    return net.other(net.conv(net.norm(net.conv(x)).relu()))


def norm_twice(net, x):
    return net.norm(net.conv(net.norm(net.conv(x)).relu()))


def weight_read_elsewhere(net, x):
    return net.norm(net.conv(x)) + net.conv.weight.square().mean()


def statistics_read_elsewhere(net, x):
    return net.norm(net.conv(x)) + net.norm.running_var.sum() * x.mean() + net.norm.weight.sum()


def norm_of_norm(net, x):
    return net.other(net.norm(net.conv(x)))


def standardised_weight(net, x):
    weight = net.conv.weight
    weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
    return net.norm(F.conv2d(x, weight, net.conv.bias, padding=1))


def weight_computed_from_the_input(net, x):
    return net.norm(F.conv2d(x, net.conv.weight * x.mean().sigmoid(), net.conv.bias, padding=1))


def statistics_computed_in_forward(net, x):
    return F.batch_norm(net.conv(x), net.norm.running_mean * 2, x.detach().mean().abs() + net.norm.running_var)


def detached_output(net, x):
    return net.norm(net.conv(x).detach())


def convolution_without_grad(net, x):
    with torch.no_grad():
        y = net.conv(x)
    return net.norm(y)


def relu_between(net, x):
    return net.norm(net.conv(x).relu())


def norm_first(net, x):
    return net.conv(net.norm(x))


@pytest.mark.parametrize(
    ("function", "folded"),
    [
        (convolution_twice, 2),
        (norm_twice, 2),
        (weight_read_elsewhere, 1),
        (statistics_read_elsewhere, 1),
        (norm_of_norm, 2),
        (standardised_weight, 1),
        (weight_computed_from_the_input, 1),
        (statistics_computed_in_forward, 1),
        (two_norms_of_one_output, 0),
        (output_read_elsewhere, 0),
        (detached_output, 0),
        (convolution_without_grad, 0),
        (relu_between, 0),
        (norm_first, 0),
    ],
)
@pytest.mark.filterwarnings("ignore:convbn_tune folded no batch norm")
def test_sharing(function, folded):
    with counted() as counts:
        assert_as_eager(randomise(Net(function).double()), double(2, 4, 6, 6), folded=folded)
    assert all(counts.reasons)


@pytest.mark.parametrize(
    "parametrisation", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm]
)
def test_parametrised_weights_fold(parametrisation):
    model = randomise(nn.Sequential(parametrisation(nn.Conv2d(4, 8, 3)), nn.BatchNorm2d(8)).double())
    assert_as_eager(model, double(2, 4, 8, 8), folded=1)


def test_statistics_changed_between_convolution_and_norm():
    """pytorch#121184: a rewrite that reads the statistics where the convolution stands gets the old ones."""

    def changing(net, x):
        y = net.conv(x)
        net.norm.running_mean.add_(0.5)
        return net.norm(y)

    model, x = randomise(Net(changing).double()), double(2, 4, 6, 6)
    other = copy.deepcopy(model)
    assert max(relative_errors(run(compiled(model), model, x), run(other, other, x)).values()) <= 1e-8
    assert torch.equal(model.norm.running_mean, other.norm.running_mean)


@pytest.mark.filterwarnings("ignore:convbn_tune folded no batch norm")
@pytest.mark.parametrize("lowering", ["aot_eager", "inductor"])
@pytest.mark.parametrize("what", ["conv.bias", "norm.bias", "buffer"])
def test_what_forward_changes_after_the_pair_is_read_as_it_was(what, lowering):
    """pytorch#197039: the partitioner reads such values again in backward. Eager does not keep these."""

    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
            self.register_buffer("buffer", torch.randn(4))

        def forward(self, x):
            bias = self.buffer if what == "buffer" else self.conv.bias
            y = self.norm(F.conv2d(x, self.conv.weight, bias))
            with torch.no_grad():
                dict([*self.named_parameters(), *self.named_buffers()])[what].mul_(0.5).add_(1)
            return y

    model, x = randomise(Changing().double()), double(2, 4, 6, 6)
    other = copy.deepcopy(model)
    assert (
        max(relative_errors(run(compiled(model, lowering=lowering), model, x), run(other, other, x)).values()) <= 1e-8
    )


def test_an_output_that_the_user_gets_too_is_left_alone():
    class Both(Net):
        def forward(self, x):
            y = self.conv(x)
            return y, self.norm(y)

    model, x = randomise(Both(None).double()), double(2, 4, 6, 6)
    with counted() as counts, pytest.warns(UserWarning, match="folded no batch norm"):
        found = compiled(model)(x)
    assert counts.reasons == ["the convolution's output is also read by the caller"]
    torch.testing.assert_close(found, model(x))


# --- dtypes ------------------------------------------------------------------------------------------------------

KINDS = ["autocast", "bfloat16 model", "bfloat16 convolution, float32 norm"]


def low_precision(kind, groups, bias):
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=groups, bias=bias), nn.BatchNorm2d(16))
    if kind == "bfloat16 model":
        model.bfloat16()
    if kind == "bfloat16 convolution, float32 norm":
        model[0].bfloat16()
    return model


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_is_no_worse_than_twice_eager(kind, groups, bias):
    """Root mean square error against float64, over seeds: one seed's rounding is noise."""
    model = low_precision(kind, groups, bias)
    tuned = compiled(model)
    squares = {}
    for seed in range(8):
        torch.manual_seed(seed)
        model[0].reset_parameters()
        exact = copy.deepcopy(randomise(model)).double()
        x = torch.randn(4, 16, 12, 12, dtype=torch.float32 if kind == "autocast" else torch.bfloat16)
        wanted = run(exact, exact, x.double().requires_grad_())
        for name, function in (("eager", model), ("tune", tuned)):
            with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
                found = run(function, model, x.clone().requires_grad_())
            for key, want in wanted.items():
                error = (found[key].double() - want).norm() / want.norm()
                squares[name, key] = squares.get((name, key), 0.0) + error.item() ** 2
    ratios = {key: (squares["tune", key] / squares["eager", key]) ** 0.5 for key in wanted}
    assert max(ratios.values()) <= 2, ratios


@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_does_not_round_the_shift(kind):
    """Its rounding would move a whole channel; the weight's is kept out by a scale of 1."""
    torch.manual_seed(1)
    model = randomise(low_precision(kind, 1, True))
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight.bfloat16())
        model[1].running_var.fill_(1)
        model[1].weight.fill_(1)
    x = torch.randn(16, 16, 24, 24, dtype=torch.float32 if kind == "autocast" else torch.bfloat16)
    exact = copy.deepcopy(model).double()(x.bfloat16().double())
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        error = (compiled(model)(x).double() - exact).mean((0, 2, 3)).abs().max()
    assert error <= 1.5e-3  # eager: 1.1e-3; with a rounded shift: 6e-3


@pytest.mark.parametrize("variance", [1e-4, 1e4])
def test_float16_keeps_to_its_range(variance):
    """With a scale of 0.01 the gradient of the folded weight is 100 times that of the weight: above 65504 here."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)).eval()
    model[1].running_var.fill_(variance)
    x = torch.rand(8, 3, 64, 64) * 255 if variance > 1 else torch.randn(8, 3, 64, 64) * 0.01
    cotangent = torch.linspace(0.1, 1, 62)

    def gradients(function, *, half):
        model.zero_grad()
        with torch.autocast("cpu", torch.float16, enabled=half):
            (function(x).float() * cotangent).sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    exact, eager = gradients(model, half=False), gradients(model, half=True)
    for name, gradient in gradients(compiled(model), half=True).items():
        errors = [(found - exact[name]).norm() / exact[name].norm() for found in (gradient, eager[name])]
        assert errors[0] <= max(2 * errors[1], 1e-3), name


@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_keeps_dtypes(kind):
    model = randomise(low_precision(kind, 1, True))
    x = torch.randn(2, 16, 8, 8, dtype=torch.float32 if kind == "autocast" else torch.bfloat16, requires_grad=True)
    results = []
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"), counted() as counts:
        for function in (model, compiled(model)):
            found = run(function, model, x)
            results.append({name: tensor.dtype for name, tensor in found.items()})
    assert counts.folded == 1
    assert results[0] == results[1]


class Cast(nn.Module):
    """A bfloat16 convolution, its output cast to float32, and a float32 norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 16, 3).bfloat16(), nn.BatchNorm2d(16)

    def forward(self, x):
        return self.norm(self.conv(x.to(self.conv.weight.dtype)).to(self.norm.weight.dtype))


@pytest.mark.filterwarnings("ignore:convbn_tune folded no batch norm")
@pytest.mark.parametrize("trains_scale", [False, True])
def test_a_widening_cast_between_costs_no_precision(trains_scale):
    """Eager has the scale's gradient in float32; the folded weight's, of which ours is made, is in bfloat16."""
    torch.manual_seed(0)
    model, x = randomise(Cast()), torch.randn(8, 16, 12, 12).bfloat16().float().requires_grad_()
    model.norm.weight.requires_grad_(trains_scale)
    exact = copy.deepcopy(model).double()
    wanted = run(exact, exact, x.detach().double().requires_grad_())
    eager = run(model, model, x)
    with counted() as counts:
        tuned = run(compiled(model), model, x)
    assert counts.folded == (not trains_scale)
    if trains_scale:
        assert "cast to torch.float32 and scaled there" in counts.refused[0].reason
    for name, want in wanted.items():
        if want is not None:
            assert tuned[name].dtype == eager[name].dtype
            errors = [(found[name].double() - want).norm() / want.norm() for found in (tuned, eager)]
            assert errors[0] <= 2 * errors[1], name


def test_a_narrowing_cast_between_is_left_alone():
    """The convolution in float32, the norm in bfloat16."""

    class Narrow(Net):
        def forward(self, x):
            return self.norm(self.conv(x).bfloat16())

    model = randomise(Narrow(None))
    model.norm.bfloat16()
    with counted() as counts, pytest.warns(UserWarning, match="folded no batch norm"):
        compiled(model)(torch.randn(2, 4, 6, 6)).sum().backward()
    assert counts.reasons == ["its input comes from prims.convert_element_type, not from a convolution or linear layer"]


# --- shapes, graphs, layouts -------------------------------------------------------------------------------------


def test_dynamic_shapes_compile_once():
    model = pair()
    tuned = torch.compile(model, backend="convbn_tune", dynamic=True, options={"lowering": "aot_eager"})
    with counted() as counts:
        for size in (2, 3, 7):
            x = double(size, 4, 6 + size, 9)
            errors = relative_errors(run(tuned, model, x), run(model, model, x))
            assert max(errors.values()) <= 1e-8
    assert (counts.graphs, counts.folded) == (1, 1)


def test_several_graphs():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = pair(), pair(nn.Conv2d(8, 8, 3))

        def forward(self, x):
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    with counted() as counts:
        assert_as_eager(Broken(), double(2, 4, 9, 9), folded=2)
    assert counts.graphs == 2


def test_a_graph_without_batch_norm():
    with counted() as counts:
        assert_as_eager(nn.Conv2d(4, 8, 3).double(), double(2, 4, 8, 8), folded=0)
    assert counts.refused == []


def test_channels_last_weights_stay_channels_last():
    model = pair().to(memory_format=torch.channels_last)
    x = double(2, 4, 8, 8).detach().to(memory_format=torch.channels_last).requires_grad_()
    assert_as_eager(model, x, folded=1)
    wanted, found = model(x), compiled(model)(x)
    assert found.stride() == wanted.stride()


def test_depthwise_weights_keep_their_layout_through_inductor():
    """Inductor may give an axis of one entry any stride, but oneDNN reads the layout there."""
    model = pair(nn.Conv2d(8, 8, 3, groups=8)).to(memory_format=torch.channels_last)
    x = double(2, 8, 6, 6).detach().to(memory_format=torch.channels_last).requires_grad_()
    _, codes = run_and_get_code(lambda: compiled(model, lowering="inductor")(x).sum().backward())
    allocated = [line for code in codes for line in code.splitlines() if "empty_strided_cpu((8, 1, 3, 3)" in line]
    assert allocated
    assert all("(9, 1, 3, 1)" in line for line in allocated)


# --- training mode -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lowering", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore:convbn_tune folded no batch norm")
def test_batch_statistics_are_left_alone_and_updated_as_eager_does(lowering):
    model = pair(nn.Conv2d(4, 8, 3, bias=False)).train()
    other, x = copy.deepcopy(model), double(4, 4, 8, 8)
    with counted() as counts:
        found = run(compiled(model, lowering=lowering), model, x)
    wanted = run(other, other, x)
    assert counts.reasons == ["it runs on batch statistics (training mode)"]
    assert max(relative_errors(found, wanted).values()) <= 1e-8
    assert max(relative_errors(dict(model.named_buffers()), dict(other.named_buffers())).values()) <= 1e-12


def test_train_and_eval_norms_in_one_model():
    model = nn.Sequential(pair(), pair(nn.Conv2d(8, 8, 3, bias=False)))
    model[1].train()
    other, x = copy.deepcopy(model), double(4, 4, 9, 9)
    with counted() as counts:
        found = run(compiled(model), model, x)
    assert counts.folded == 1
    assert len(counts.refused) == 1
    assert max(relative_errors(found, run(other, other, x)).values()) <= 1e-8
    assert max(relative_errors(dict(model.named_buffers()), dict(other.named_buffers())).values()) <= 1e-12


# --- modes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("mode", ["tune", "deploy", "eval", "train"])
def test_inference(mode, context):
    model, x = pair(), double(2, 4, 8, 8)
    with context(), counted() as counts:
        error = (compiled(model, mode=mode)(x) - model(x)).abs().max()
    assert error <= 1e-12
    assert counts.folded == (mode in ("tune", "deploy"))


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("lowering", ["aot_eager", "inductor"])
def test_eval_and_train_leave_the_graph(mode, lowering):
    with counted() as counts:
        assert_as_eager(pair(), double(2, 4, 8, 8), folded=0, mode=mode, lowering=lowering)
    assert counts.refused == []


@pytest.mark.parametrize("lowering", ["aot_eager", "inductor"])
def test_deploy_refuses_gradients_and_names_tune(lowering):
    with pytest.raises(ValueError, match='mode="deploy" computes no gradients.*mode="tune"'):
        compiled(pair(), mode="deploy", lowering=lowering)(double(2, 4, 8, 8))


def test_deploy_sees_new_weights():
    model, x = pair(), double(2, 4, 8, 8)
    deployed = compiled(model, mode="deploy")
    with torch.no_grad():
        for _ in range(2):
            assert (deployed(x) - model(x)).abs().max() <= 1e-12
            model[0].weight.add_(1)
            model[1].running_var.mul_(3)


# --- other machinery of torch around a pair ------------------------------------------------------------------------


def checkpointed(net, x):
    return net.other(net.conv(checkpoint(lambda t: net.norm(net.conv(t)), x, use_reentrant=False)))


def norm_alone_checkpointed(net, x):
    return checkpoint(net.norm, net.conv(x), use_reentrant=False)


def in_a_branch(net, x):
    return torch.cond(x.sum() > 0, lambda t: net.norm(net.conv(t)), lambda t: net.other(net.conv(t)), (x,))


def weight_halved_in_forward(net, x):
    with torch.no_grad():
        net.conv.weight.mul_(0.5)
    return net.norm(net.conv(x))


def hooked_output(net, x):
    y = net.conv(x)
    y.register_hook(lambda grad: 2 * grad)
    return net.norm(y)


AROUND = [checkpointed, in_a_branch, norm_alone_checkpointed, weight_halved_in_forward, hooked_output]


@pytest.mark.parametrize(
    ("function", "lowering"),
    [*((function, "aot_eager") for function in AROUND), *((function, "inductor") for function in AROUND[2:])],
)
@pytest.mark.filterwarnings("ignore:convbn_tune folded no batch norm", "ignore::UserWarning:torch")
def test_around_a_pair(function, lowering):
    """With Inductor, a checkpoint and a branch are in test_peers."""
    model, x = randomise(Net(function).double()), double(2, 4, 6, 6)
    other = copy.deepcopy(model)
    errors = relative_errors(run(compiled(model, lowering=lowering), model, x), run(other, other, x))
    assert max(errors.values()) <= 1e-8


@pytest.mark.parametrize("lowering", ["aot_eager", "inductor"])
def test_dropout_is_the_same_in_forward_and_backward(lowering):
    """Tagging the fold for recomputation must not make the partitioner draw random numbers again."""
    model = nn.Sequential(pair()[:2], nn.Dropout(0.3), pair(nn.Conv2d(8, 8, 3))[:2], nn.Dropout(0.5))
    model[1].train(), model[3].train()
    x, results = double(2, 4, 9, 9), []
    for mode in ("tune", "eval"):
        torch.manual_seed(3)
        results.append(run(compiled(model, mode=mode, lowering=lowering), model, x))
        torch._dynamo.reset()
    assert max(relative_errors(*results).values()) <= 1e-12
