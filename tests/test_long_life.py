"""A compiled model through a long life: always today's parameters and flags, and a bounded number of compilations."""

import copy
import itertools

import pytest
import torch
from support import compiled, counted, randomise, relative_errors, run
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:convbn_tune folded no batch norm")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 2)
        randomise(self.double())

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def images(size=2, dtype=torch.float64):
    return torch.randn(size, 3, 8, 8, dtype=dtype, requires_grad=True)


def assert_as_a_fresh_copy(tuned, model, x, tolerance=1e-8):
    """Outputs, gradients and running statistics are those of an uncompiled copy made now."""
    reference = copy.deepcopy(model)
    errors = relative_errors(run(tuned, model, x), run(reference, reference, x))
    assert max(errors.values()) <= tolerance
    for (name, mine), theirs in zip(model.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)


def step(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad


def other_weights(model):
    model.load_state_dict(Net().state_dict())


def own_statistics(model):
    with torch.no_grad():
        model.stem[1].running_var.mul_(1.5)
        model.body[1].running_mean.add_(0.5)


def swap(model):
    """As an exponential moving average is swapped in: other tensors under the old names."""
    model.body[0].weight.data = torch.randn_like(model.body[0].weight)
    model.body[1].weight = nn.Parameter(torch.rand_like(model.body[1].weight) + 0.5)


@pytest.mark.parametrize("lowering", ["aot_eager", "inductor"])
def test_todays_parameters(lowering):
    model = Net()
    tuned = compiled(model, lowering=lowering)
    with counted() as counts:
        assert_as_a_fresh_copy(tuned, model, images())
        for change in (step, other_weights, own_statistics, swap, step, other_weights):
            change(model)
            assert_as_a_fresh_copy(tuned, model, images())
    assert counts.graphs == 1


def test_train_eval_and_no_grad_take_turns():
    """One graph for each: training, eval with gradients, eval without."""
    model = Net()
    tuned = compiled(model, fold="always")
    with counted() as counts:
        for _ in range(4):
            assert_as_a_fresh_copy(tuned, model.train(), images())
            assert_as_a_fresh_copy(tuned, model.eval(), images())
            with torch.no_grad():
                torch.testing.assert_close(tuned(x := images()), model(x))
            step(model)
    assert counts.graphs == 3
    assert counts.folded == 4


def test_batch_sizes():
    """The second size makes the graph dynamic; no other compiles again."""
    model = Net()
    tuned = compiled(model)
    with counted() as counts:
        for size in (2, 3, 5, 4, 2, 7, 3):
            assert_as_a_fresh_copy(tuned, model, images(size))
    assert counts.graphs == 2


def test_dtypes():
    model = Net()
    tuned = compiled(model)
    with counted() as counts:
        for dtype in (torch.float64, torch.float32, torch.float64, torch.float32):
            model.to(dtype)
            assert_as_a_fresh_copy(tuned, model, images(dtype=dtype), 1e-8 if dtype is torch.float64 else 1e-3)
    assert counts.graphs <= 3  # Module.to() changes the parameters' .data: torch looks at them anew


@pytest.mark.xfail(
    torch.__version__ < (2, 12),
    reason="torch 2.11's torch.compile does not see requires_grad_ of a parameter, whatever the backend",
    strict=False,
)
def test_progressive_unfreezing():
    """From the head to the stem and back: one graph for each set of trained parameters."""
    model, x = Net(), images().detach()
    tuned = compiled(model, fold="always")
    parts = [model.head, model.body, model.stem]
    states = [set(parts[: index + 1]) for index in range(3)]
    with counted() as counts:
        for trained in (*states, *reversed(states), *states):
            for part in parts:
                part.requires_grad_(part in trained)
            assert_as_a_fresh_copy(tuned, model, x)
            step(model)
    assert counts.graphs == 3


def test_any_order():
    """Flags and parameters in all orders of three changes."""
    model = Net()
    tuned = compiled(model)
    changes = {
        "train": lambda: model.train(),
        "eval": lambda: model.eval(),
        "weights": lambda: other_weights(model),
    }
    with counted() as counts:
        for order in itertools.permutations(changes):
            for name in order:
                changes[name]()
                assert_as_a_fresh_copy(tuned, model, images())
    assert counts.graphs == 2
