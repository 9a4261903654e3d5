"""What PyTorch's efficient_conv_bn_eval_fx_passes (torch 2.13) gets wrong, crashes on or misses: one test each."""

import pytest
import torch
import torch.nn.functional as F
from support import assert_as_eager, compiled, counted, joint_graph, randomise, relative_errors, run
from test_backend import double, pair
from torch import nn
from torch.utils.checkpoint import checkpoint

from convbn_compile import explain, joint_pass

pytestmark = pytest.mark.filterwarnings("ignore:convbn_tune folded no batch norm")


class Net(nn.Module):
    """A convolution or linear layer, a norm, and a function of them and the input."""

    def __init__(self, function, layer, norm):
        super().__init__()
        self.function, self.layer, self.norm = function, layer, norm
        randomise(self.double())

    def forward(self, x):
        return self.function(self.layer, self.norm, x)


def net2d(function, **options):
    return Net(function, nn.Conv2d(4, 8, 3, **options), nn.BatchNorm2d(8))


@pytest.mark.parametrize(
    "function",
    [
        lambda conv, norm, x: norm(F.conv2d(x, conv.weight, bias=conv.bias)),
        lambda conv, norm, x: norm(F.conv2d(x, conv.weight, conv.bias, stride=2, padding=1, dilation=2)),
        lambda conv, norm, x: norm(F.conv2d(x.repeat(1, 2, 1, 1), conv.weight, conv.bias, groups=2)),
        lambda conv, norm, x: norm(F.conv2d(input=x, weight=conv.weight)),
        lambda conv, norm, x: norm(F.conv2d(bias=conv.bias, weight=conv.weight, input=x, padding="same")),
    ],
    ids=["bias", "stride padding dilation", "groups", "all keywords", "padding same"],
)
def test_convolution_with_keyword_arguments(function):
    """Rows 1 and 2, pytorch#196165."""
    assert_as_eager(net2d(function), double(2, 4, 9, 9), folded=1)


def test_linear_with_bias_as_keyword():
    """Row 3."""
    model = Net(
        lambda linear, norm, x: norm(F.linear(x, linear.weight, bias=linear.bias)), nn.Linear(5, 8), nn.BatchNorm1d(8)
    )
    assert_as_eager(model, double(12, 5), folded=1)


@pytest.mark.parametrize(("shape", "norm"), [((6, 8, 5), nn.BatchNorm1d), ((2, 8, 8, 5), nn.BatchNorm2d)])
def test_linear_layer_whose_channels_are_not_the_norms(shape, norm):
    """Row 4: the norm's channels are dim 1, which has as many entries as the last dim."""
    with counted() as counts:
        assert_as_eager(
            Net(lambda linear, norm, x: norm(linear(x)), nn.Linear(5, 8), norm(8)), double(*shape), folded=0
        )
    assert counts.reasons == ["its channels are not the output channels of the linear layer before it"]


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), (4, 10)),
        (nn.Conv2d(4, 8, 3), nn.BatchNorm1d(8), (4, 10, 6)),
        (nn.Conv3d(4, 8, 3), nn.BatchNorm2d(8), (4, 10, 6, 5)),
        (nn.ConvTranspose2d(4, 8, 3), nn.BatchNorm1d(8), (4, 6, 5)),
    ],
    ids=["1d", "2d", "3d", "2d transposed"],
)
def test_unbatched_convolution_whose_sizes_happen_to_match(layer, norm, shape):
    """Row 5: without a batch, dim 1 is a spatial one."""
    with counted() as counts:
        assert_as_eager(Net(lambda layer, norm, x: norm(layer(x)), layer, norm), double(*shape), folded=0)
    assert counts.reasons == ["its channels are not the output channels of the convolution before it"]


def changed_input(conv, norm, x):
    x = x * 1.0
    y = conv(x)
    x.add_(1)
    return norm(y)


def changed_weight(conv, norm, x):
    y = conv(x)
    conv.weight.mul_(2)
    return norm(y)


@pytest.mark.parametrize("function", [changed_input, changed_weight])
def test_changes_in_place_between_convolution_and_norm(function):
    """Rows 6 and 7."""
    with torch.no_grad():
        model, x = net2d(function), double(2, 4, 9, 9, requires_grad=False)
        other = net2d(function)
        other.load_state_dict(model.state_dict())
        for _ in range(2):
            torch.testing.assert_close(compiled(model)(x), other(x))


def test_changed_input_of_a_frozen_convolution():
    """Row 6 with gradients."""
    model = net2d(changed_input)
    model.layer.requires_grad_(False)
    assert_as_eager(model, double(2, 4, 9, 9, requires_grad=False), folded=0)
    assert_as_eager(model, double(2, 4, 9, 9, requires_grad=False), folded=1, fold="always")


@pytest.mark.parametrize("fold", ["auto", "always"])
def test_convolution_under_no_grad_gets_no_gradients(fold):
    """Row 8."""

    def function(conv, norm, x):
        with torch.no_grad():
            y = conv(x)
        return norm(y)

    model, x = net2d(function), double(2, 4, 9, 9)
    assert_as_eager(model, x, fold=fold)
    assert model.layer.weight.grad is None
    assert x.grad is None


@pytest.mark.parametrize("inside", ["convolution", "norm"])
def test_autocast_on_one_side_keeps_the_output_dtype(inside):
    """Rows 9 and 10."""

    def function(conv, norm, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=inside == "convolution"):
            y = conv(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside == "norm"):
            return norm(y)

    model, x = net2d(function).float(), torch.randn(2, 4, 9, 9, requires_grad=True)
    wanted = run(model, model, x)
    with counted() as counts:
        found = run(compiled(model), model, x)
    assert counts.folded == 1
    assert found["output"].dtype == wanted["output"].dtype
    assert max(relative_errors(found, wanted).values()) <= (1e-5 if inside == "norm" else 2e-2)


def test_inside_a_checkpoint():
    """Row 11."""
    block = nn.Sequential(pair(), nn.ReLU(), pair(nn.Conv2d(8, 8, 3)))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=False)

    for lowering in ("aot_eager", "inductor"):
        assert_as_eager(Model(), double(2, 4, 9, 9), folded=2, lowering=lowering)


@pytest.mark.parametrize("lowering", ["aot_eager", "inductor"])
def test_inside_cond(lowering):
    """Row 12."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.other = pair(), nn.Conv2d(4, 8, 3).double()

        def forward(self, x):
            return torch.cond(x.sum() > 0, self.pair, self.other, (x,)) * 2.0

    model, sides = Model(), double(2, 4, 9, 9, requires_grad=False).abs()
    for x in (sides, -sides):
        torch.compiler.reset()
        assert_as_eager(model, x.requires_grad_(), folded=1, lowering=lowering)
        report = explain(model, x.detach())
        assert (report.folded, report.norms) == (1, 2)  # cond computes its branch again in backward


@pytest.mark.parametrize("lowering", ["aot_eager", "inductor"])
def test_inside_a_nested_compile_region(lowering):
    """Another higher-order operator: one graph for all blocks that are alike."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([pair(nn.Conv2d(4, 8, 3)), pair(nn.Conv2d(8, 8, 3)), pair(nn.Conv2d(8, 8, 3))])

        @torch.compiler.nested_compile_region
        def block(self, index, x):
            return self.blocks[index](x)

        def forward(self, x):
            for index in range(3):
                x = self.block(index, x)
            return x * 2

    assert_as_eager(Model(), double(2, 4, 12, 12), folded=3, lowering=lowering)


@pytest.mark.parametrize(("inputs", "outputs", "groups"), [(4, 8, 2), (8, 8, 8), (4, 4, 4), (8, 4, 4)])
def test_grouped_transposed_convolutions(inputs, outputs, groups):
    """Row 13."""
    model = Net(
        lambda layer, norm, x: norm(layer(x)),
        nn.ConvTranspose2d(inputs, outputs, 3, stride=2, groups=groups),
        nn.BatchNorm2d(outputs),
    )
    assert_as_eager(model, double(2, inputs, 5, 5), folded=1)


def test_bfloat16_convolution_before_a_float32_norm():
    """Row 14."""
    model = randomise(nn.Sequential(nn.Conv2d(4, 8, 3).bfloat16(), nn.BatchNorm2d(8)))
    x = torch.randn(2, 4, 9, 9).bfloat16()
    with counted() as counts:
        found = compiled(model)(x)
    assert counts.folded == 1
    assert found.dtype == model(x).dtype
    torch.testing.assert_close(found, model(x), rtol=2e-2, atol=2e-2)


def test_symbolically_traced_nested_modules():
    """Row 15."""
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Sequential(pair()), nn.ReLU()))
    assert_as_eager(model, double(2, 4, 9, 9), folded=1)


def test_exported_graph_with_padding_same():
    """Row 16."""
    model = nn.Sequential(pair(nn.Conv2d(4, 8, 3, padding="same")), nn.ReLU(), pair(nn.Conv2d(8, 8, 3)))
    exported = torch.export.export(model, (double(2, 4, 9, 9),)).module()
    assert_as_eager(exported, double(2, 4, 9, 9), folded=2)


def test_hand_added_bias_before_the_norm():
    """Row 17."""
    model = Net(
        lambda conv, norm, x: norm(conv(x) + norm.weight.detach().view(1, -1, 1, 1)),
        nn.Conv2d(4, 8, 3),
        nn.BatchNorm2d(8),
    )
    assert_as_eager(model, double(2, 4, 9, 9), folded=1)


def test_an_output_with_a_second_reader_is_left_alone_with_a_reason():
    """Row 17."""
    with counted() as counts:
        assert_as_eager(net2d(lambda conv, norm, x: norm(y := conv(x)) + y.sigmoid()), double(2, 4, 9, 9), folded=0)
    (reason,) = counts.reasons
    assert reason.startswith("the convolution's output is also read by aten.sigmoid")


# --- what the pass was right on, or users complained of elsewhere --------------------------------------------------


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_padding_modes(mode):
    model = nn.Sequential(pair(nn.Conv2d(4, 8, 3, padding=1, padding_mode=mode)))
    assert_as_eager(model, double(2, 4, 9, 9), folded=1)


def test_vmap():
    model = pair()

    def over_a_stack(x):
        return torch.func.vmap(model, randomness="different")(x)

    x = double(3, 2, 4, 9, 9)
    errors = relative_errors(run(compiled(over_a_stack), model, x), run(over_a_stack, model, x))
    assert max(errors.values()) <= 1e-8


def test_functional_call():
    model = pair()
    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}

    def call(x):
        return torch.func.functional_call(model, weights, (x,))

    x = double(2, 4, 9, 9)
    with counted() as counts:
        found = compiled(call)(x)
    assert counts.folded == 1
    cotangent = torch.randn_like(found)
    wanted = torch.autograd.grad(call(x), list(weights.values()), cotangent)
    for gradient, want in zip(torch.autograd.grad(found, list(weights.values()), cotangent), wanted, strict=True):
        torch.testing.assert_close(gradient, want)


class Twice(torch.autograd.Function):
    """The gradient it hands on is not that of what it computes."""

    @staticmethod
    def forward(ctx, x):
        return x * 2.0

    @staticmethod
    def backward(ctx, grad):
        return grad.transpose(-1, -2) * 5.0


def test_a_custom_function_between_whose_gradient_is_another():
    assert_as_eager(net2d(lambda conv, norm, x: norm(Twice.apply(conv(x)))), double(2, 4, 9, 9))


@pytest.mark.parametrize("lowering", ["aot_eager", "inductor"])
def test_the_folded_weight_keeps_the_weights_memory_format(lowering):
    model = pair().to(memory_format=torch.channels_last)
    x = double(2, 4, 9, 9).detach().to(memory_format=torch.channels_last).requires_grad_()
    module = joint_graph(model, x)
    joint_pass.run(module.graph)
    (convolution,) = module.graph.find_nodes(op="call_function", target=torch.ops.aten.convolution.default)
    assert convolution.args[1].meta["val"].is_contiguous(memory_format=torch.channels_last)
    assert_as_eager(model, x, folded=1, lowering=lowering)


def test_empty_graphs():
    tuned = compiled(nn.Identity())
    x = double(2, 3)
    assert torch.equal(tuned(x), x)
    assert compiled(lambda x: (x, None))(x)[1] is None
