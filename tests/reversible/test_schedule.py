"""CoefficientSchedule: its way, what holds it up, checkpoints, bad input."""

import copy
import re

import pytest
import torch
from reversible.nets import chain_of

from convbn_compile.reversible import CoefficientSchedule, make_reversible


@pytest.fixture
def handle():
    return make_reversible(chain_of(4), chains=[""])


def test_a_straight_line(handle):
    schedule = CoefficientSchedule(handle, 10, end=(0.0, 1.0))
    seen = [(handle.alpha, handle.beta)]
    for _ in range(6):
        schedule.step()
        seen.append((handle.alpha, handle.beta))
    alphas, betas = zip(*seen, strict=True)
    assert alphas == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0])
    assert betas == pytest.approx([0.125, 0.34375, 0.5625, 0.78125, 1.0, 1.0, 1.0])
    assert seen[-1] == (0.0, 1.0)


def test_a_controlled_one_waits_while_the_loss_is_high(handle):
    schedule = CoefficientSchedule(handle, 20, schedule="controlled", tolerance=0.05)
    schedule.step(1.0)
    assert schedule.moved == 1
    for _ in range(3):
        schedule.step(torch.tensor(3.0))
    assert schedule.moved == 1
    for _ in range(40):
        schedule.step(0.9)
    assert (handle.alpha, handle.beta) == (0.3, 0.7)


def test_a_controlled_one_without_anchors_moves_on_while_the_error_is_large(handle):
    schedule = CoefficientSchedule(handle, 20, schedule="controlled", error=1e-7)
    schedule.step(1.0)
    handle.gradient_error = lambda *_: 1e-4
    schedule.step(3.0, batch=torch.zeros(1))
    assert schedule.moved == 1  # anchors bound it
    handle.anchor_every = None
    schedule.step(3.0, batch=torch.zeros(1))
    assert schedule.moved == 2


def test_a_controlled_one_stops_where_gradients_are_exact_enough(handle):
    schedule = CoefficientSchedule(handle, 20, schedule="controlled")
    schedule.step(1.0, batch=torch.randn(5, 6, dtype=torch.float64))  # in float64 they are from the start
    schedule.step(1.0)
    assert schedule.arrived
    assert schedule.moved == 0


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_step_without_a_loss_holds_up_one_step(handle, loss):
    schedule = CoefficientSchedule(handle, 20, schedule="controlled")
    for value in (1.0, loss, 1.0):
        schedule.step(torch.tensor(value, requires_grad=True))
    assert schedule.moved == 2


def test_losses_below_0(handle):
    schedule = CoefficientSchedule(handle, 20, schedule="controlled")
    for step in range(4):
        schedule.step(-1.0 - step)
    assert schedule.moved == 4


def test_nothing_is_measured_at_the_end(handle):
    schedule = CoefficientSchedule(handle, 1, schedule="controlled")
    schedule.step(1.0)
    handle.gradient_error = None
    schedule.step(1.0, batch=torch.zeros(1))


def test_a_checkpoint(handle):
    schedule = CoefficientSchedule(handle, 20, schedule="controlled")
    for _ in range(3):
        schedule.step(1.0)
    state = copy.deepcopy(schedule.state_dict())
    other = CoefficientSchedule(make_reversible(chain_of(4), chains=[""]), 20, schedule="controlled")
    other.load_state_dict(state)
    assert (other.handle.alpha, other.handle.beta) == (handle.alpha, handle.beta)
    for each in (schedule, other):
        each.step(0.5)
    assert other.state_dict() == schedule.state_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_steps": 0}, "total_steps must be an int of at least 1, got 0"),
        ({"until": 0.0}, "until must be a share of the steps in (0, 1], got 0.0"),
        ({"end": (0.3, 0.0)}, "end must have a beta above 0, got (0.3, 0.0)."),
        ({"end": (0.3,)}, "end must be a pair (alpha, beta), got (0.3,)."),
        ({"end": (float("nan"), 0.7)}, "alpha must be a finite number of at least 0, got nan"),
        ({"tolerance": -1.0}, "tolerance must be a finite number of at least 0, got -1.0"),
        ({"schedule": "cosine"}, 'schedule must be "linear" or "controlled", got \'cosine\''),
    ],
)
def test_errors(handle, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CoefficientSchedule(handle, **{"total_steps": 10, **arguments})


def test_more_errors(handle):
    with pytest.raises(TypeError, match="handle must be what make_reversible returns, got 3"):
        CoefficientSchedule(3, 10)
    with pytest.raises(TypeError, match="until must be a number, got 'x'"):
        CoefficientSchedule(handle, 10, until="x")
    with pytest.raises(ValueError, match="needs the loss of each step"):
        CoefficientSchedule(handle, 10, schedule="controlled").step()
    with pytest.raises(ValueError, match=re.escape("got ['steps']")):
        CoefficientSchedule(handle, 10).load_state_dict({"steps": 1})
