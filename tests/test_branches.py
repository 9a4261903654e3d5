"""Parallel branches become one convolution, forward and backward; what cannot, or does not pay, is left alone."""

import pytest
import torch
from support import assert_as_eager, compiled, copied, counted, joint_graph, operators, randomise, relative_errors, run
from test_backend import double
from torch import nn

import convbn_compile
from convbn_compile import joint_pass
from convbn_compile.options import Fold

CONVOLUTION, BACKWARD = "aten.convolution.default", "aten.convolution_backward.default"


def norm(channels, rank=2):
    return (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1](channels)


def conv_norm(channels, kernel, rank=2, **options):
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    padding = [options.get("dilation", 1) * (size - 1) // 2 for size in kernel]
    return nn.Sequential(kind(channels, channels, kernel, padding=padding, bias=False, **options), norm(channels, rank))


class Sum(nn.Module):
    """Branches of one input, and what is made of their outputs."""

    def __init__(self, *branches, function=sum, after=None):
        super().__init__()
        self.branches, self.function, self.after = nn.ModuleList(branches), function, after or nn.Identity()
        randomise(self.double())

    def forward(self, x):
        return self.after(self.function([branch(x) for branch in self.branches])).tanh()


class Scaled(nn.Module):
    """LayerScale."""

    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x):
        return x * self.gamma


def in_another_order(outputs):
    first, *rest = outputs
    return rest[1] + (first + rest[0]) + sum(rest[2:])


def in_pairs(outputs):
    return outputs[0] + (outputs[2] + outputs[1])


def difference(outputs):
    return outputs[0] - 2 * outputs[1]


def rep_mixer():
    """FastViT's: x + gamma * (mixer(x) - norm(x))."""

    class RepMixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = Sum(conv_norm(4, (3, 3), groups=4), conv_norm(4, (1, 1), groups=4), norm(4))
            self.norm, self.scale = norm(4), Scaled(4)
            randomise(self.double())

        def forward(self, x):
            mixed = sum(branch(x) for branch in self.mixer.branches)
            return (x + self.scale(mixed - self.norm(x))).tanh()

    return RepMixer()


def repvgg(channels=4, *, itself=True, **options):
    branches = [conv_norm(channels, (3, 3), **options), conv_norm(channels, (1, 1), **options)]
    return Sum(*branches, *([norm(channels)] if itself else []))


MERGED = {
    "repvgg": (lambda: repvgg(), 1),
    "repvgg, strided": (lambda: repvgg(itself=False, stride=2), 1),
    "grouped": (lambda: repvgg(groups=2), 1),
    "depthwise": (lambda: repvgg(groups=4), 1),
    "mobileone": (lambda: Sum(*(conv_norm(4, (3, 3)) for _ in range(4)), conv_norm(4, (1, 1)), norm(4)), 4),
    "repghost": (lambda: Sum(conv_norm(4, (3, 3), groups=4), norm(4)), 0),
    "large kernel": (lambda: Sum(conv_norm(4, (7, 7), groups=4), conv_norm(4, (3, 3), groups=4)), 1),
    "norm of the sum": (lambda: Sum(conv_norm(4, (3, 3)), nn.Conv2d(4, 4, 1), nn.Identity(), after=norm(4)), 1),
    "rep_mixer": (rep_mixer, 1),
    "another order": (
        lambda: Sum(*(conv_norm(4, (k, k)) for k in (3, 1, 3)), norm(4), nn.Identity(), function=in_another_order),
        2,
    ),
    "difference": (lambda: Sum(conv_norm(4, (3, 3)), conv_norm(4, (1, 1)), function=difference, after=Scaled(4)), 1),
    "dilated": (lambda: repvgg(dilation=2), 1),
    "valid": (lambda: Sum(nn.Conv2d(4, 4, 1, padding="valid"), conv_norm(4, (3, 3))), 1),
    "no norm at all": (lambda: Sum(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)), 1),
    "1d": (lambda: Sum(conv_norm(4, (3,), 1), conv_norm(4, (1,), 1), norm(4, 1)), 1),
    "3d": (lambda: Sum(conv_norm(4, (3, 3, 3), 3), conv_norm(4, (1, 1, 1), 3), norm(4, 3)), 1),
}


def image(name):
    return double(2, 4, *{"1d": (9,), "3d": (4, 5, 6)}.get(name, (9, 8)))


@pytest.mark.parametrize("name", MERGED)
def test_branches_merge(name, monkeypatch):
    make, merged = MERGED[name]
    seen, original = [], joint_pass.run

    def watched(graph, **options):
        before, report = operators(graph), original(graph, **options)
        seen.append((report, before, copied(graph.owning_module).graph))
        return report

    monkeypatch.setattr(joint_pass, "run", watched)
    assert_as_eager(make(), image(name))
    ((report, before, graph),) = seen
    after = operators(graph)
    assert report.merged == merged == before[CONVOLUTION] - 1
    assert (after[CONVOLUTION], after[BACKWARD]) == (1, 1)
    assert report.refused == ()
    assert_nothing_but_convolutions_on_the_input(graph)


def assert_nothing_but_convolutions_on_the_input(graph):
    """What the input itself did as a branch, and its norm's gradients, are in them; no other pass over it is left."""
    (backward,) = (node for node in graph.nodes if str(node.target) == BACKWARD)
    assert {str(user.target) for user in backward.args[1].users} == {CONVOLUTION, BACKWARD}
    grad_input = next(user for user in backward.users if user.args[1] == 0)
    assert [user.op for user in grad_input.users] == ["output"]


@pytest.mark.usefixtures("vectorised")
@pytest.mark.parametrize("make", [rep_mixer, lambda: repvgg(channels=32)], ids=["rep_mixer", "repvgg"])
def test_generated_code(make):
    """Of vectors and two threads, as torch 2.13's of index_add, which writes out of bounds."""
    model = make()
    channels = next(parameter.shape[0] for parameter in model.parameters())
    with counted() as counts, torch._inductor.config.patch({"cpp.threads": 2}):
        assert_as_eager(model, double(2, channels, 9, 8), lowering="inductor")
    assert counts.merged == 1


SUBSETS = [*((frozen, True) for frozen in range(16)), *((frozen, False) for frozen in (0, 3, 5, 6, 9, 14))]


@pytest.mark.parametrize(("frozen", "requires_grad"), SUBSETS)
def test_frozen_subsets(frozen, requires_grad):
    """Every gradient that eager has, no other."""
    model = repvgg()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(not frozen >> (index % 4) & 1)
    assert_as_eager(model, double(2, 4, 9, 8, requires_grad=requires_grad), fold="always")


def test_a_chain_of_blocks():
    """The gradient of a block's input is added up from its branches before the block before it reads it."""
    model = nn.Sequential(repvgg(), repvgg(groups=2), rep_mixer(), repvgg())
    with counted() as counts:
        assert_as_eager(model, double(2, 4, 9, 8))
    assert counts.merged == 4


def test_one_module_twice():
    """Its weight has the gradients of both branches."""
    branch = conv_norm(4, (3, 3))
    with counted() as counts:
        assert_as_eager(Sum(branch, branch, nn.Conv2d(4, 4, 1)), double(2, 4, 9, 8))
    assert counts.merged == 2


class Linear(nn.Module):
    """A linear layer of the channels, whose output lies in memory with the channels last."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x.transpose(1, 2)).transpose(1, 2)


def test_gradients_that_lie_otherwise_in_memory():
    """Backward views the gradient of the sum's input as a matrix, as it lay before."""
    model = nn.Sequential(Linear(), Sum(conv_norm(4, (1,), 1), norm(4, 1), nn.Identity()), Linear()).double()
    with counted() as counts:
        assert_as_eager(model, double(2, 4, 5))
    assert counts.folded == 2


class Around(nn.Module):
    """What a function makes of an input and of what is in the module."""

    def __init__(self, inner, function):
        super().__init__()
        self.inner, self.function = inner, function

    def forward(self, x):
        return self.function(x, self.inner)


def beside(inner):
    """Reads its input again, past what is in it."""
    return Around(inner, lambda x, inner: x.sigmoid() + inner(x) - x.exp() * 0.1)


@pytest.mark.parametrize("make", [repvgg, rep_mixer])
def test_the_input_is_read_elsewhere(make):
    """Of the sum that is its gradient, what the branches put in goes, the rest stays."""
    with counted() as counts:
        assert_as_eager(nn.Sequential(beside(make()), beside(make())), double(2, 4, 9, 8))
    assert counts.merged == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("place", range(3))
def test_a_branch_of_the_detached_input(place, dtype):
    """Its weight has a gradient, the input has none from it."""
    model = repvgg()
    model.branches[place] = Around(model.branches[place], lambda x, inner: inner(x.detach()))
    tolerance = {} if dtype is torch.float64 else {"output": 1e-2, "gradients": 1e-2}
    with counted() as counts:
        assert_as_eager(
            model.to(dtype), double(2, 4, 9, 8).detach().to(dtype).requires_grad_(), fold="always", **tolerance
        )
    assert counts.merged == 1


def test_a_norm_of_the_input_on_batch_statistics():
    """It is left alone, though its scale is a linear map's as well as any; the convolutions merge where they can."""
    for together in (True, False):
        model = repvgg()
        model.branches[2].train()
        model.function = sum if together else in_pairs
        with counted() as counts:
            torch.compiler.reset()
            x = double(2, 4, 9, 8)
            compiled(model)(x)
        reasons = {(refusal.kind, "batch statistics" in refusal.reason) for refusal in counts.refused}
        assert ("batch norm", True) in reasons
        assert counts.merged == together
        assert (("branches", True) in reasons) != together


def test_gamma_of_zero():
    """The gradient of gamma is that of its branch all the same, though the branch adds nothing."""
    model = repvgg()
    with torch.no_grad():
        model.branches[1][1].weight.zero_()
        model.branches[2].weight.zero_()
    assert_as_eager(model, double(2, 4, 9, 8))


def test_without_gradients():
    model = nn.Sequential(repvgg(), repvgg())
    with torch.no_grad(), counted() as counts:
        x = double(2, 4, 9, 8)
        torch.testing.assert_close(compiled(model)(x), model(x))
    assert counts.merged == 2


def test_merging_can_be_turned_off():
    with counted() as counts:
        assert_as_eager(repvgg(), double(2, 4, 9, 8), merge_branches=False)
    assert counts.merged == 0


class Computed(nn.Module):
    """A convolution whose weight is computed in the graph."""

    def __init__(self):
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.randn(4, 4, 1, 1)), norm(4)

    def forward(self, x):
        return self.norm(nn.functional.conv2d(x, self.weight.tanh()))


LEFT = {
    "concatenated": (
        lambda: Sum(conv_norm(4, (3, 3)), conv_norm(4, (1, 1)), function=lambda found: torch.cat(found, 1)),
        None,
    ),
    "multiplied": (
        lambda: Sum(conv_norm(4, (3, 3)), conv_norm(4, (1, 1)), function=lambda found: found[0] * found[1]),
        None,
    ),
    "a plain residual": (lambda: Sum(conv_norm(4, (3, 3)), nn.Identity()), None),
    "other places": (
        lambda: Sum(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, dilation=2, padding=1)),
        "cannot be one convolution: their kernels lie on different places",
    ),
    "other groups": (lambda: Sum(conv_norm(4, (3, 3)), conv_norm(4, (3, 3), groups=2)), "they differ in groups"),
    "more work": (lambda: Sum(conv_norm(4, (1, 7)), conv_norm(4, (7, 1))), "one kernel of 7x7 would do more work"),
    "read elsewhere": (
        lambda: Sum(
            conv_norm(4, (3, 3)),
            conv_norm(4, (1, 1)),
            function=lambda found: found[0] + found[1] + found[1].sigmoid(),
        ),
        "is also read by aten.sigmoid",
    ),
    "added twice": (
        lambda: Sum(
            conv_norm(4, (3, 3)), conv_norm(4, (1, 1)), function=lambda found: found[0] + found[1] + 3 * found[0]
        ),
        "a gradient that is not that of its own backward",
    ),
    "few places": (
        lambda: Sum(conv_norm(4, (3, 3), stride=8), conv_norm(4, (1, 1), stride=8)),
        "adding up the weights would be more work than what it saves at 4 places of the output",
    ),
    "a computed weight": (lambda: Sum(conv_norm(4, (3, 3)), Computed()), "computed in the graph"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_alone(name):
    """With one line in the report for the sum, though it has two branches."""
    make, reason = LEFT[name]
    with counted() as counts:
        assert_as_eager(make(), double(2, 4, 9, 8, requires_grad=False))
    assert counts.merged == 0
    reasons = [refusal.reason for refusal in counts.refused if refusal.kind == "branches"]
    assert len(reasons) == (reason is not None)
    assert all(reason in given for given in reasons)
    assert counts.convolutions_gone == 0


@pytest.mark.parametrize("kernels", [(1, 3), (3, 1)])
def test_what_was_folded_by_itself_is_not_merged_after(kernels):
    """Though what is left of its backward would make that look cheap."""
    model = Sum(*(conv_norm(4, (kernel, kernel)) for kernel in kernels))
    model.branches[kernels.index(3)].requires_grad_(requires_grad=False)
    with counted() as counts:
        assert_as_eager(model, double(2, 4, 9, 8))
    assert (counts.convolutions_gone, counts.merged, counts.folded) == (0, 0, 2)


class Gated(nn.Module):
    """A block, and a norm that the function applies somewhere else."""

    def __init__(self, block, function):
        super().__init__()
        self.block, self.gate, self.function = block, norm(4), function
        randomise(self.double())

    def forward(self, x):
        return self.function(x.exp(), self.block, self.gate)


def test_another_norm_of_the_input_has_a_reason_of_its_own():
    model = Gated(repvgg(), lambda x, block, gate: block(x) * gate(x).sigmoid())
    report = convbn_compile.explain(model, double(2, 4, 9, 8))
    (refusal,) = report.refused
    assert (refusal.module, report.merged) == ("gate", 1)
    assert refusal.reason == "its input comes from aten.exp, not from a convolution or linear layer"


def test_a_norm_of_a_merged_sum_that_something_else_reads():
    def gated(x, block, gate):
        both = sum(branch(x) for branch in block.branches)
        return both.sigmoid() * gate(both)

    model = Gated(Sum(conv_norm(4, (3, 3)), conv_norm(4, (1, 1))), gated)
    report = convbn_compile.explain(model, double(2, 4, 9, 8))
    (refusal,) = report.refused
    assert (refusal.module, refusal.reason, report.merged) == ("gate", "something else reads its input, too", 1)


@pytest.mark.parametrize("function", [sum, lambda outputs: outputs[0] + (outputs[2] + outputs[1])])
def test_a_branch_that_does_not_merge_beside_two_that_do(function):
    """It has its line whether or not the two can be merged without it."""
    branches = conv_norm(4, (3, 3)), conv_norm(4, (1, 1)), conv_norm(4, (3, 3), groups=2)
    model = Sum(*branches, function=function)
    with counted() as counts:
        assert_as_eager(model, double(2, 4, 9, 8))
    (refusal,) = convbn_compile.explain(model, double(2, 4, 9, 8)).refused
    assert refusal.reason == "the branches cannot be one convolution: they differ in groups"
    assert counts.merged == (function is sum)


def without_norms():
    return Sum(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1))


WAYS = [(without_norms, "aot_eager"), (repvgg, "aot_eager"), (repvgg, "inductor")]


@pytest.mark.parametrize(("make", "lowering"), WAYS, ids=["without norms", "repvgg", "repvgg, inductor"])
def test_weights_that_are_parts_of_one_tensor(make, lowering):
    model = make()
    together = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(together, model.parameters())
    assert model.branches[1][0].weight.storage_offset() if make is repvgg else model.branches[1].weight.storage_offset()
    with counted() as counts:
        assert_as_eager(model, double(2, 4, 9, 8), lowering=lowering)
    assert counts.merged == counts.convolutions_gone > 0


class Slices(nn.Module):
    """Of one parameter, the second of which starts within its memory."""

    def __init__(self):
        super().__init__()
        self.weight, self.pointwise = nn.Parameter(torch.randn(8, 4, 3, 3)), nn.Parameter(torch.randn(4, 4, 1, 1))
        self.double()

    def forward(self, x):
        first, second = self.weight.chunk(2)
        conv2d = nn.functional.conv2d
        return (conv2d(x, second, padding=1) + conv2d(x, self.pointwise)).tanh() * conv2d(x, first, padding=1)


@pytest.mark.parametrize("lowering", ["aot_eager", "inductor"])
def test_weights_that_are_slices(lowering):
    with counted() as counts:
        assert_as_eager(Slices(), double(2, 4, 9, 8), lowering=lowering, folded=0)
    assert counts.merged == 1


@pytest.mark.parametrize(("make", "lowering"), WAYS, ids=["without norms", "repvgg", "repvgg, inductor"])
def test_channels_last_weights_merge_into_one(make, lowering):
    """The output lies in memory as eager's does: who views it after a graph break relies on it."""
    model, x = make().to(memory_format=torch.channels_last), double(2, 4, 9, 8)
    with counted() as counts:
        assert_as_eager(model, x, lowering=lowering)
        assert compiled(model, lowering=lowering)(x).stride() == model(x).stride() == (288, 1, 32, 4)
    assert counts.merged


@pytest.mark.parametrize("lowering", ["aot_eager", "inductor"])
def test_no_gradient_is_a_part_of_another(lowering):
    """Who scales gradients in place, as clipping does, scales each once."""
    model, x = Sum(*(nn.Conv2d(4, 4, size, padding=size // 2) for size in (3, 1, 5))), double(2, 4, 9, 8)
    gradients = torch.autograd.grad(compiled(model, lowering=lowering)(x).sum(), list(model.parameters()))
    assert len({gradient.untyped_storage().data_ptr() for gradient in gradients}) == len(gradients)


def test_merging_alone_is_no_cause_for_a_warning(recwarn):
    """That nothing is folded would be said otherwise."""
    model = Sum(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), after=nn.Sequential(nn.ReLU(), norm(4)))
    with counted() as counts:
        assert_as_eager(model, double(2, 4, 9, 8), folded=0)
    assert counts.merged == 1
    assert not [warning for warning in recwarn if "folded no batch norm" in str(warning.message)]


def test_the_report_names_the_module_that_adds_up():
    model = nn.Sequential(repvgg(), LEFT["more work"][0]())
    report = convbn_compile.explain(model, double(2, 4, 9, 8))
    assert [item.module for item in report.rewrites if item.kind == "branches"] == ["0"]
    assert [item.module for item in report.refused if item.kind == "branches"] == ["1"]
    assert (report.folded, report.norms, report.merged) == (5, 5, 1)
    assert "merged away 1 convolutions" in str(report)


class Residual(nn.Module):
    """x + gamma * block(x), in float32 where autocast leaves it; gamma is small."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.gamma = inner, nn.Parameter(torch.full((8, 1, 1), 1e-2, dtype=torch.float64))

    def forward(self, x):
        inside = x.to(torch.bfloat16) if torch.is_autocast_enabled("cpu") else x
        return x + self.gamma * sum(branch(inside) for branch in self.inner.branches)


def far_from_zero(model):
    """Means of the statistics that are large for the deviation."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.add_(10)
    return model


LOW = {
    "repvgg": lambda: nn.Sequential(repvgg(8), repvgg(8)),
    "residual": lambda: nn.Sequential(*(Residual(repvgg(8)) for _ in range(4))),
    "far from zero": lambda: far_from_zero(repvgg(8)),
}


@pytest.mark.parametrize("kind", ["autocast", "bfloat16", "float16"])
@pytest.mark.parametrize("name", LOW)
def test_low_precision(name, kind):
    """Not above twice eager's own error against float64: of the output, the input's gradient, and of all gradients."""
    torch.manual_seed(0)
    model = LOW[name]()
    x = double(4, 8, 12, 12)
    exact = run(model, model, x)
    dtype = {"autocast": torch.float32}.get(kind) or getattr(torch, kind)
    model, x = model.to(dtype), x.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"), counted() as counts:
        found, wanted = run(compiled(model), model, x), run(model, model, x)
    assert counts.merged == {"repvgg": 2, "residual": 4, "far from zero": 1}[name]
    exact = {name: tensor.to(wanted[name].dtype) for name, tensor in exact.items()}
    mine, theirs = relative_errors(found, exact), relative_errors(wanted, exact)
    assert max(mine.values()) <= 2 * max(theirs.values())
    for tensor in ("output", "input 0"):
        assert mine[tensor] <= 2 * theirs[tensor], tensor


def test_always_merges_what_does_not_pay():
    model = LEFT["more work"][0]()
    graph = joint_graph(model, double(2, 4, 9, 8))
    assert joint_pass.run(graph.graph, fold=Fold.ALWAYS).merged == 1
