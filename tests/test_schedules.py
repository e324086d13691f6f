"""λ schedules: their values, how they are applied, resumed and refused."""

from __future__ import annotations

import pickle

import numpy
import pytest
import torch
from torch import nn

import racecar
from racecar.schedules import LamSchedule, constant, cosine, every, exponential, linear, off_after, warmup


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return racecar.wrap(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), [0.5, 0.25])


VALUES = [
    (constant(), [1, 1, 1]),
    (constant(0.5), [0.5, 0.5]),
    (warmup(3), [0.25, 0.5, 0.75, 1, 1]),
    (linear(4), [1, 0.75, 0.5, 0.25, 0, 0]),
    (linear(2, end=0.5), [1, 0.75, 0.5, 0.5]),
    (cosine(4), [1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2, 0, 0]),
    (exponential(2, end=0.01), [1, 0.1, 0.01, 0.01]),
    (every(3), [3, 0, 0, 3]),
    (every(2, off_after(1)), [2, 0, 0, 0]),
    (off_after(2), [1, 1, 0, 0]),
    (off_after(0), [0]),
    (warmup(1, then=linear(2)), [0.5, 1, 0.5, 0]),
    (off_after(3, warmup(1, then=constant(2))), [1, 2, 2, 0]),
]


@pytest.mark.parametrize(("schedule", "values"), VALUES, ids=[str(schedule) for schedule, _ in VALUES])
def test_values(schedule, values) -> None:
    assert [schedule(step) for step in range(len(values))] == pytest.approx(values)
    again = pickle.loads(pickle.dumps(schedule))
    assert again == schedule and again(1) == schedule(1)


def test_a_schedule_sets_lambda_before_every_step() -> None:
    model = net()
    schedule = LamSchedule(model, warmup(1, then=off_after(1)))
    found = []
    for step in range(3):
        factor = schedule.set(step)
        model(torch.randn(2, 4))
        found.append((factor, model.lam, model.reverse_loss.item() > 0))
    assert found == [(0.5, [0.25, 0.125], True), (1.0, [0.5, 0.25], True), (0.0, [0.0, 0.0], False)]


def test_parts_and_functions_of_ones_own() -> None:
    model = nn.ModuleDict({"a": net(), "b": nn.Sequential(nn.Flatten(), net())})
    LamSchedule(model, lambda step: numpy.float32(step)).set(2)
    assert model["a"].lam == model["b"][1].lam == [1.0, 0.5]


def test_a_state_goes_on_at_its_step() -> None:
    first = LamSchedule(net(), linear(4))
    first.set(numpy.int64(3))
    model = net()
    model.lam = 7.0  # not what the factors refer to
    second = LamSchedule(model, linear(4))
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    assert model.lam == [0.125, 0.0625] and second.step == 3
    second.set(2)
    assert model.lam == [0.25, 0.125]
    fresh = LamSchedule(net(), linear(4))
    fresh.load_state_dict(LamSchedule(net(), linear(4)).state_dict())
    assert fresh.step is None and next(iter(fresh.parts.values())).lam == [0.5, 0.25]


def test_steps_do_not_recompile() -> None:
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    model, x = net(), torch.randn(2, 4)
    run = torch.compile(lambda x: model(x).sum() + model.reverse_loss, fullgraph=True, backend=backend)
    schedule = LamSchedule(model, off_after(8, warmup(4, then=cosine(20))))
    losses = []
    for step in range(8):
        schedule.set(step)
        losses.append(run(x).item())
    assert len(compiled) == 1 and len(set(losses)) == 8
    for step in range(8, 11):
        schedule.set(step)
        torch.testing.assert_close(run(x), model(x).sum())
    assert len(compiled) == 2  # the one without a reverse pass


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: warmup(0), ValueError, "steps must be at least 1, got 0"),
        (lambda: warmup(2.5), TypeError, "steps must be a whole number, got float 2.5"),
        (lambda: cosine(True), TypeError, "steps must be a whole number, got bool True"),
        (lambda: linear(3, end=-1), ValueError, "end must be finite and at least 0, got -1.0"),
        (lambda: linear(3, end=float("nan")), ValueError, "end must be finite"),
        (lambda: exponential(3, end=0), ValueError, "above 0"),
        (lambda: constant("1"), TypeError, "factor must be a number, got str '1'"),
        (lambda: warmup(3, then=0.5), TypeError, "then must be a schedule such as"),
        (lambda: off_after(3, lambda step: 1), TypeError, "before must be a schedule"),
        (lambda: constant()(-1), ValueError, "step must be at least 0, got -1"),
        (lambda: constant()(1.0), TypeError, "step must be a whole number"),
        (lambda: LamSchedule(net(), 0.5), TypeError, "must be a function of the step"),
        (lambda: LamSchedule(nn.Linear(2, 2), constant()), ValueError, "no part of this Linear is wrapped"),
        (lambda: LamSchedule(net(), lambda step: None).set(0), TypeError, "factor at step 0 must be a number"),
        (lambda: LamSchedule(net(), lambda step: -1).set(4), ValueError, "factor at step 4 must be finite"),
        (lambda: LamSchedule(net(), constant()).set("1"), TypeError, "step must be a whole number"),
        (
            lambda: LamSchedule(net(), constant()).load_state_dict({"step": 1, "base": {"": [0.5]}}),
            ValueError,
            "belongs to the wrapped parts {'': 1}.*model's are {'': 2}",
        ),
    ],
)
def test_refused(make, error, says) -> None:
    with pytest.raises(error, match=says):
        make()


def test_a_bad_factor_leaves_lambda_as_it_was() -> None:
    model = net()
    schedule = LamSchedule(model, lambda step: 1.0 if step < 1 else float("inf"))
    schedule.set(0)
    with pytest.raises(ValueError, match="finite"):
        schedule.set(1)
    assert model.lam == [0.5, 0.25] and schedule.step == 0
