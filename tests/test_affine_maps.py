"""Per-channel affine maps fold, however they are spelled; what is none, or not alone, is left with a reason."""

import pytest
import torch
from support import assert_as_eager, compiled, counted, randomise, relative_errors, run
from test_backend import double
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:convbn_tune folded no batch norm")


class Affine(nn.Module):
    """A convolution or linear layer and a function of its output and four vectors, trained or not."""

    def __init__(self, function, layer=None, *, trained=True):
        super().__init__()
        self.function = function
        self.layer = nn.Conv2d(3, 4, 3) if layer is None else layer
        self.weight, self.bias = (nn.Parameter(torch.randn(4), requires_grad=trained) for _ in range(2))
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("var", torch.rand(4) + 0.5)
        self.double()

    def forward(self, x):
        return self.function(self, self.layer(x)).tanh()


def of_image(vector):
    return vector.reshape(1, -1, 1, 1)


def torchvision_frozen(net, y):
    """torchvision.ops.FrozenBatchNorm2d, and DETR's."""
    scale = of_image(net.weight) * (of_image(net.var) + 1e-5).rsqrt()
    return y * scale + (of_image(net.bias) - of_image(net.mean) * scale)


def textbook(net, y):
    y = (y - net.mean[:, None, None]) / torch.sqrt(net.var[:, None, None] + 1e-5)
    return y * net.weight[:, None, None] + net.bias[:, None, None]


def power(net, y):
    return (y - of_image(net.mean)) * (of_image(net.var) + 1e-5) ** -0.5 * of_image(net.weight) + of_image(net.bias)


def addcmul(net, y):
    return torch.addcmul(of_image(net.bias), y, of_image(net.weight))


def reversed_subtraction(net, y):
    return of_image(net.mean) - y * of_image(net.weight)


def with_alpha(net, y):
    return torch.sub(torch.add(y, of_image(net.mean), alpha=3), of_image(net.bias), alpha=0.5) * of_image(net.weight)


def alpha_on_the_output(net, y):
    return torch.add(of_image(net.mean), y, alpha=-2.0) / of_image(net.weight)


def negated_twice(net, y):
    return -(-y * of_image(net.weight)) + 1


def through_views(net, y):
    y = y.flatten(2).permute(0, 2, 1).unsqueeze(1)
    y = y * net.weight + net.bias
    return y.squeeze(1).permute(0, 2, 1).reshape(2, 4, 6, 6)


def channels_last_and_back(net, y):
    return (y.permute(0, 2, 3, 1).contiguous() * net.weight).permute(0, 3, 1, 2) - of_image(net.mean)


def addcdiv(net, y):
    return torch.addcdiv(of_image(net.bias), y, of_image(net.var), value=3)


def expanded(net, y):
    return y * of_image(net.weight).expand_as(y) - of_image(net.bias).expand_as(y)


def alpha_without_a_name(net, y):
    return torch.ops.aten.sub.Scalar(y * of_image(net.weight), 2, 3)


def times_zero(net, y):
    return y * 0.0 * of_image(net.weight) + of_image(net.bias)


SPELLINGS = [
    torchvision_frozen,
    textbook,
    power,
    addcmul,
    reversed_subtraction,
    with_alpha,
    alpha_on_the_output,
    negated_twice,
    through_views,
    channels_last_and_back,
    addcdiv,
    expanded,
    alpha_without_a_name,
    times_zero,
]


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_fold(spelling, trained):
    assert_as_eager(Affine(spelling, trained=trained), double(2, 3, 8, 8), folded=1)


@pytest.mark.parametrize("spelling", [torchvision_frozen, textbook, channels_last_and_back])
def test_spellings_fold_under_inductor(spelling):
    assert_as_eager(Affine(spelling), double(2, 3, 8, 8), folded=1, lowering="inductor")


def test_hand_written_maps_are_named_by_their_module():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4))

        def forward(self, y):
            return y * of_image(self.weight)

    with counted() as counts:
        assert_as_eager(nn.Sequential(nn.Conv2d(3, 4, 3), Frozen()).double(), double(2, 3, 8, 8), folded=1)
    assert [(item.module, item.kind) for item in counts.rewrites] == [("1", "affine")]


def flattened(net, y):
    return (y * of_image(net.weight) + of_image(net.bias)).flatten(2) * 2


@pytest.mark.parametrize("spelling", [torchvision_frozen, flattened, channels_last_and_back])
def test_dynamic_shapes(spelling):
    """Not with Inductor: torch 2.13's compiles the backward of a convolution anew for each size, or fails."""
    model = Affine(spelling)
    tuned = torch.compile(model, backend="convbn_tune", dynamic=True, options={"lowering": "aot_eager"})
    with counted() as counts:
        for size in (8, 5, 9):
            x = double(size, 3, size + 2, 7)
            errors = relative_errors(run(tuned, model, x), run(model, model, x))
            assert max(errors.values()) <= 1e-10
    assert (counts.graphs, counts.folded) == (1, 1)


# --- what is not one -----------------------------------------------------------------------------------------------


def varies_over_the_batch(net, y):
    return y * torch.arange(1.0, 3.0).double().reshape(2, 1, 1, 1)


def varies_over_space(net, y):
    return y * torch.arange(1.0, 7.0).double()


def gated_by_itself(net, y):
    return y * y.mean((0, 2, 3), keepdim=True)


def squared(net, y):
    return y * y * of_image(net.weight)


def divided_by_it(net, y):
    return of_image(net.weight) / (y * y + 1)


def no_scale(net, y):
    return y + of_image(net.bias)


def only_a_number(net, y):
    return y * 0.5 + 1


def an_infinite_number(net, y):
    return (y * float("inf") * of_image(net.weight)).clamp(-1, 1)


def over_zero(net, y):
    return (y * of_image(net.weight) / 0.0).clamp(-1, 1)


def times_itself_expanded(net, y):
    return y * y.expand(2, *y.shape[1:])


@pytest.mark.parametrize(
    "function",
    [
        varies_over_the_batch,
        varies_over_space,
        gated_by_itself,
        squared,
        divided_by_it,
        no_scale,
        only_a_number,
        times_itself_expanded,
    ],
)
def test_other_maps_are_left_alone(function):
    assert_as_eager(Affine(function), double(2, 3, 8, 8), folded=0, fold="always")


@pytest.mark.parametrize(("function", "folded"), [(an_infinite_number, 0), (over_zero, 1)])
def test_numbers_that_are_no_scales(function, folded):
    """What is not finite in eager is not finite in the same places; the gradients are NaN on both sides."""
    model, x = Affine(function), double(2, 3, 8, 8, requires_grad=False)
    with counted() as counts, torch.no_grad():
        torch.testing.assert_close(compiled(model)(x), model(x))
    assert counts.folded == folded


def scale_of_an_output_read_elsewhere(net, y):
    return y * of_image(net.weight) + y.sigmoid()


def two_maps_of_one_output(net, y):
    return (y * of_image(net.weight)).tanh() + (y * of_image(net.var)).sigmoid()


@pytest.mark.parametrize("function", [scale_of_an_output_read_elsewhere, two_maps_of_one_output])
def test_maps_that_are_not_alone_are_left_alone(function):
    with counted() as counts:
        assert_as_eager(Affine(function), double(2, 3, 8, 8), folded=0, fold="always")
    assert [(refusal.kind, "is also read by" in refusal.reason) for refusal in counts.refused] == [("affine", True)]


def test_one_convolution_called_twice():
    """Each call has an adjoint of its own, though both have one gradient, input and weight."""

    class Twice(Affine):
        def forward(self, x):
            return (self.layer(x) * of_image(self.weight) + self.layer(x) * of_image(self.bias)).tanh()

    assert_as_eager(Twice(None), double(2, 3, 8, 8), folded=2)


@pytest.mark.parametrize("dims", [(1,), (1, 2)])
def test_tokens_that_are_summed(dims):
    """The gradient is an expanded vector, which has no view of the rows of a matrix product."""

    class Summed(Affine):
        def forward(self, x):
            return (self.layer(x) * self.weight).sum(dims)

    x = double(2, 3, 5, 3)
    assert_as_eager(Summed(None, nn.Linear(3, 4)), x, folded=1)


@pytest.mark.parametrize(("trained", "folded"), [(True, 1), (False, 0)])
def test_a_scale_beyond_float16(trained, folded):
    """Its own output does not fit into float16, the product in the operator's dtype would be infinite."""

    class Widened(Affine):
        def forward(self, x):
            return self.layer(x) * self.weight.float() * 2000

    model = Widened(None, nn.Linear(3, 4), trained=trained).half()
    with torch.no_grad():
        model.weight.fill_(4)
        model.layer.weight.uniform_(1.5, 2)
    x = torch.full((2, 3), 2.0, dtype=torch.float16)
    with counted() as counts:
        found = run(compiled(model, fold="always"), model, x)
    wanted = run(model, model, x)
    assert counts.folded == folded
    assert found["output"].isfinite().all()
    assert found["output"].max() > 65504
    assert max(relative_errors(found, wanted).values()) <= 2e-3


def test_the_scale_before_a_fork_folds():
    """The scale's output is read twice, the convolution's once."""

    def fork(net, y):
        y = y * of_image(net.weight)
        return y.sigmoid() + y * of_image(net.var)

    assert_as_eager(Affine(fork), double(2, 3, 8, 8), folded=1)


# --- linear layers -------------------------------------------------------------------------------------------------


class LinearNorm(nn.Module):
    """A linear layer, and a batch norm or LayerScale, with the shapes of a model that has them."""

    def __init__(self, how, *, bias):
        super().__init__()
        self.how, self.linear, self.norm = how, nn.Linear(5, 4, bias=bias), nn.BatchNorm1d(4)
        self.gamma = nn.Parameter(torch.randn(4))
        randomise(self.double())

    def forward(self, x):
        return self.how(self, x).tanh()


def of_rows(net, x):
    return net.norm(net.linear(x.flatten(0, 1)))


def levit(net, x):
    y = net.linear(x)
    return net.norm(y.flatten(0, 1)).reshape_as(y)


def layer_scale(net, x):
    return net.linear(x) * net.gamma


def convnext(net, x):
    return net.linear(x.unsqueeze(1)).permute(0, 3, 1, 2) * net.gamma.reshape(1, -1, 1, 1)


def product(net, x):
    return net.norm(x.flatten(0, 1) @ net.linear.weight.t().contiguous().clone())


def levit_and_layer_scale(net, x):
    return levit(net, x) * net.gamma


@pytest.mark.parametrize(("lowering", "bias"), [("aot_eager", True), ("aot_eager", False), ("inductor", True)])
@pytest.mark.parametrize("how", [of_rows, levit, layer_scale, convnext, product, levit_and_layer_scale])
def test_linear_layers_fold(how, bias, lowering):
    assert_as_eager(LinearNorm(how, bias=bias), double(6, 3, 5), folded=1, lowering=lowering)


@pytest.mark.parametrize("frozen", ["linear.weight", "norm.weight", "norm.bias", "gamma", "input"])
def test_linear_layers_with_something_frozen(frozen):
    model = LinearNorm(levit_and_layer_scale, bias=True)
    if frozen != "input":
        model.get_parameter(frozen).requires_grad_(False)
    assert_as_eager(model, double(6, 3, 5, requires_grad=frozen != "input"), folded=1, fold="always")


def plain_and_transposed(net, x):
    square = net.square
    return (x @ square) * net.gamma + (x @ square.t()) * net.gamma


def tied(net, x):
    return (x @ net.square * net.gamma).tanh() @ net.square.t()


def linear_and_product(net, x):
    return torch.nn.functional.linear(x, net.square) * net.gamma + (x @ net.square).sin()


def of_itself(net, x):
    return (x @ x.t() @ x @ net.square) * net.gamma + x @ x


@pytest.mark.parametrize("how", [plain_and_transposed, tied, linear_and_product, of_itself])
def test_tied_square_matrices(how):
    """A matrix and its transpose have one shape: only what made them tells them apart."""
    net = LinearNorm(how, bias=False)
    net.square = nn.Parameter(torch.randn(4, 4).double())
    for fold in ("auto", "always"):
        assert_as_eager(net, double(4, 4), fold=fold)


class ScaleBySum(torch.autograd.Function):
    """Its gradient is scaled by a sum that the output's affine map is in."""

    @staticmethod
    def forward(ctx, y, scale):
        ctx.save_for_backward(y, scale)
        return y * scale.view(-1, 1, 1)

    @staticmethod
    def backward(ctx, grad):
        y, _ = ctx.saved_tensors
        total = (grad * y).sum((0, 2, 3))
        return grad * total.view(-1, 1, 1), total


def test_a_gradient_scaled_by_a_gradient_is_left_alone():
    assert_as_eager(Affine(lambda net, y: ScaleBySum.apply(y, net.weight)), double(2, 3, 8, 8), folded=0, fold="always")


def test_one_channel_that_is_broadcast_to_many():
    class Broadcast(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.gamma = nn.Linear(3, 1), nn.Parameter(torch.randn(8))

        def forward(self, x):
            return self.linear(x) * self.gamma

    assert_as_eager(Broadcast().double(), double(5, 3), folded=0, fold="always")


@pytest.mark.parametrize("how", [levit, layer_scale, levit_and_layer_scale])
def test_one_row(how):
    """With one row the gradient of the output has the shape of a scale."""
    assert_as_eager(LinearNorm(how, bias=True), double(1, 1, 5), fold="always")


def test_norm_of_norm_and_a_constant_between():
    model = randomise(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Identity(), nn.BatchNorm2d(4), nn.ReLU()).double()
    )
    with counted() as counts:
        assert_as_eager(model, double(2, 3, 8, 8), folded=2)
    assert [item.module for item in counts.rewrites] == ["1", "3"]


@pytest.mark.parametrize("shape", [(2, 3, 3, 3), (1, 3, 3, 3), (4, 3, 6, 6)])
def test_sizes_that_could_be_taken_for_another(shape):
    """Outputs of 1 x 1, one image, and as many images as channels as pixels."""
    assert_as_eager(Affine(textbook), double(*shape), folded=1, fold="always")


# --- costs ---------------------------------------------------------------------------------------------------------


def conv_norm(inputs, outputs):
    return randomise(nn.Sequential(nn.Conv2d(inputs, outputs, 3), nn.BatchNorm2d(outputs), nn.ReLU()).double())


def test_a_computed_weight_is_not_saved_for_the_fold_alone():
    class LowRank(nn.Module):
        def __init__(self, features):
            super().__init__()
            self.first, self.second = nn.Parameter(torch.randn(features, 4)), nn.Parameter(torch.randn(4, 8))
            self.scale = nn.Parameter(torch.randn(8))

        def forward(self, x):
            return (x @ (self.first @ self.second) * self.scale).tanh()

    assert_as_eager(LowRank(64).double(), double(4, 64, requires_grad=False), folded=0)
    assert_as_eager(LowRank(64).double(), double(4, 64), folded=1)  # the weight is saved for the input's gradient


@pytest.mark.parametrize(
    ("channels", "frozen", "reason"),
    [
        (
            4,
            ["0.weight"],
            "the convolution's weight is frozen but the norm's is trained: folding would add",
        ),
        (32, ["1.weight"], "no output is saved for its scale"),
        (256, [], "the convolution's weight is 1152 times as large as the output that would not be saved"),
        (4, ["1.weight"], None),
        (16, [], None),
    ],
)
def test_what_does_not_pay_is_left_alone_unless_asked_for(channels, frozen, reason):
    model = conv_norm(channels, channels)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    x = double(2, channels, 3, 3) if channels > 4 else double(2, 4, 12, 12)
    with counted() as counts:
        assert_as_eager(model, x, folded=int(reason is None))
    assert [found.startswith(reason) for found in counts.reasons] == ([] if reason is None else [True])
    assert_as_eager(model, x, folded=1, fold="always")
