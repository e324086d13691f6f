"""`racecar.measure`: figures that can be worked out by hand, and the contract's own way of counting."""

from __future__ import annotations

import gc
import time

import pytest
import torch
from torch import Tensor, nn

from racecar import measure
from racecar.measure import Spread, Timing, kept_bytes, peak_bytes, ratios, step_times

FLOAT = 4


def count_saved(run, parameters):
    """Bytes of the storages that pass through autograd's saved-tensor hooks, as the contract counts them."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = run()
    del loss
    return sum(size for size, _ in kept.values())


def test_kept_bytes_counts_each_storage_once():
    x = torch.randn(100, requires_grad=True)

    def run() -> Tensor:
        y = x.exp()  # saves its result
        return (y * y.view(10, 10).view(100)).sum()  # saves the same storage twice more

    assert kept_bytes(run, []) == 100 * FLOAT


def test_kept_bytes_leaves_parameters_out_and_counts_a_saved_input():
    layer = nn.Linear(8, 3)
    x = torch.randn(5, 8)
    assert kept_bytes(lambda: layer(x).sum(), layer.parameters()) == x.nbytes
    assert kept_bytes(lambda: layer(x.requires_grad_()).sum(), []) == x.nbytes + layer.weight.nbytes


def test_kept_bytes_sees_what_saved_tensor_hooks_do_not():
    class Hoards(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.hidden = torch.ones(1000)  # held by the node, never announced to autograd
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    x = torch.randn(10, requires_grad=True)
    run = lambda: Hoards.apply(x).sum()  # noqa: E731
    assert count_saved(run, []) == 0
    kept = kept_bytes(run, [])
    assert 1000 * FLOAT <= kept <= 1000 * FLOAT + 64


def test_kept_bytes_agrees_with_the_contract_on_a_plain_network():
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3), nn.ReLU()
    )
    x = torch.randn(4, 1, 12, 12)
    run = lambda: net(x).square().mean()  # noqa: E731
    saved = count_saved(run, net.parameters())
    assert 0 < saved == pytest.approx(kept_bytes(run, net.parameters()), abs=256)


def test_kept_bytes_releases_the_graph():
    released = []

    class Watched:
        def __del__(self):
            released.append(True)

    class Holds(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.watched = Watched()
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    x = torch.randn(10, requires_grad=True)
    kept_bytes(lambda: Holds.apply(x).exp().sum(), [])
    gc.collect()
    assert released


def test_peak_bytes_is_the_high_water_mark():
    def step() -> None:
        a = torch.empty(1000)
        del a
        b = torch.empty(500)
        c = torch.empty(600)
        del b, c
        torch.empty(100)

    assert peak_bytes(step) == 1100 * FLOAT


def test_peak_bytes_does_not_count_what_was_there_before():
    x = torch.randn(1000, requires_grad=True)
    peak = peak_bytes(lambda: (x * 2).sum().backward())
    assert 1000 * FLOAT <= peak <= 4 * 1000 * FLOAT


def test_step_times_takes_one_sample_of_each_per_round_in_alternating_order():
    calls: list[str] = []
    finished: list[int] = []
    times = step_times(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=1, progress=finished.append
    )
    assert calls == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert finished == [1, 2, 3]
    assert [len(t.samples) for t in times.values()] == [3, 3]
    assert gc.isenabled()


def test_step_times_measures_seconds():
    times = step_times({"sleep": lambda: time.sleep(0.02), "nothing": lambda: None}, rounds=3, warmup=0)
    assert 0.02 <= times["sleep"].median < 0.2
    assert times["nothing"].median < 0.02
    assert ratios(times, "sleep")["nothing"].median < 1


@pytest.mark.parametrize("wrong", [{"steps": {}}, {"rounds": 0}, {"warmup": -1}], ids=str)
def test_step_times_refuses_what_cannot_be_measured(wrong):
    arguments = {"steps": {"a": lambda: None}, "rounds": 1, "warmup": 0, **wrong}
    with pytest.raises(ValueError, match="at least one step, one round"):
        step_times(arguments.pop("steps"), **arguments)


def test_timing_summarises_its_samples():
    timing = Timing((5.0, 1.0, 2.0, 4.0, 3.0, 6.0))
    assert (timing.p20, timing.median, timing.p80) == (2.0, 3.5, 5.0)
    assert (Timing((7.0,)).p20, Timing((7.0,)).p80) == (7.0, 7.0)
    with pytest.raises(ValueError, match="at least one sample"):
        Timing(())


def test_ratios_are_taken_within_rounds():
    """A machine that is three times slower in one round does not move the ratio."""
    times = {"base": Timing((1.0, 3.0, 1.0)), "twice": Timing((2.0, 6.0, 2.0))}
    assert ratios(times, "base") == {"base": Spread((1.0, 1.0, 1.0)), "twice": Spread((2.0, 2.0, 2.0))}
    with pytest.raises(ValueError, match="no timing is named 'other'; there are 'base', 'twice'"):
        ratios(times, "other")
    with pytest.raises(ValueError, match="one call of step_times"):
        Timing((1.0,)).ratio_to(times["base"])


def test_public_names_exist():
    assert all(hasattr(measure, name) for name in measure.__all__)


@pytest.mark.gpu
def test_figures_on_a_gpu():
    x = torch.randn(1000, device="cuda", requires_grad=True)
    assert kept_bytes(lambda: x.exp().sum(), []) == 1000 * FLOAT
    assert peak_bytes(lambda: (x * 2).sum().backward(), device="cuda") >= 1000 * FLOAT
    assert step_times({"exp": lambda: x.exp()}, rounds=2, warmup=1, device="cuda")["exp"].median > 0


def test_the_release_of_what_was_there_before_is_not_taken_off(monkeypatch) -> None:
    """PyTorch knows the size of a block from an earlier profile, and reports its release in this one."""
    events = [(1, 100), (7, -50), (2, 30), (1, -100), (3, 60)]
    monkeypatch.setattr(measure, "_memory_events", lambda prof: events)
    assert peak_bytes(lambda: None) == 130
