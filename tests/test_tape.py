"""What comes again is replayed: the same numbers, bit by bit, whatever was recorded."""

from __future__ import annotations

import dataclasses
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from cases import CASES
from cases import make as make_layer
from chains import CHAINS
from chains import make as make_chain
from torch import Tensor, nn

import racecar
import racecar_kernels as rk
from racecar_kernels import chain_ops, extension, linear_chain, tape
from racecar_kernels.layer import Chain

pytestmark = pytest.mark.skipif(extension.load() is None, reason="tapes are replayed by the compiled extension")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where Triton's kernels run
POLICIES = [("full", "store"), ("full", "recompute"), ("local", "store"), ("local", "deferred")]
CALLS = [(name, torch.float32) for name in CHAINS] + [("pooled", torch.float64), ("batch norm", torch.bfloat16)]


def refusals() -> list[str]:
    return [why for tapes in tape._TAPES.values() for why in tapes.seen.values() if why is not None]


def recorded() -> int:
    return sum(len(tapes.known) for tapes in tape._TAPES.values())


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) and x.stride() == y.stride() for x, y in zip(a, b, strict=True))


def thrice(run: Any, change: Any) -> None:
    """Run, recorded and replayed; then other numbers, replayed and by Python."""
    first, second, third = run(), run(), run()
    count = recorded()
    assert count > 0 and refusals() == []
    assert same(first, second) and same(first, third)
    change()
    replayed = run()
    assert recorded() == count
    tape.enabled = False
    try:
        assert same(run(), replayed)
    finally:
        tape.enabled = True
    assert not same(first, replayed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_reverse_layer(case: Any, dtype: torch.dtype) -> None:
    s = make_layer(case, dtype)

    def run() -> list[Tensor]:
        a, loss = rk.reverse_layer(s.y, s.target, s.op.weight, s.op.bias, **s.settings)
        return [a.detach(), loss.detach(), *torch.autograd.grad(a.sum() + loss, s.tensors)]

    thrice(run, lambda: s.y.data.add_(0.25))


@pytest.mark.parametrize(("variant", "memory"), POLICIES)
@pytest.mark.parametrize(("name", "dtype"), CALLS)
def test_a_chain(name: str, variant: str, memory: str, dtype: torch.dtype) -> None:
    s = make_chain(name, dtype, last=True)

    def run() -> list[Tensor]:
        out, losses = rk.tied_chain(*s.arguments, last=s.last, variant=variant, memory=memory)
        weights = torch.arange(1, losses.numel() + 1, dtype=losses.dtype)
        grads = torch.autograd.grad(out.sum().to(losses.dtype) + (losses * weights).sum(), s.tensors, allow_unused=True)
        return [out.detach(), losses.detach(), *(torch.zeros(()) if g is None else g for g in grads)]

    if run() and not tape._TAPES:
        pytest.skip("chains of narrow linear layers are one call already")
    thrice(run, lambda: s.x.data.add_(0.25))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())  # fmt: skip


def step(net: Any, x: Tensor) -> list[Tensor]:
    net.zero_grad()
    (net(x).square().sum() + net.reverse_loss).backward()
    return [p.grad.clone() for p in net.parameters()]


def test_running_statistics_go_on() -> None:
    """They are the model's, not a tape's."""
    x, found = torch.randn(4, 3, 8, 8), []
    for enabled in (True, False):
        tape.enabled, net = enabled, racecar.wrap(network(), lam=0.1)
        try:
            grads = [step(net, x + i) for i in range(5)]
        finally:
            tape.enabled = True
        found.append([*grads[-1], *net.buffers()])
    assert recorded() > 0 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_every_shape_has_its_own_tape_and_there_are_only_so_many() -> None:
    net = racecar.wrap(network(), lam=0.1)
    for size in range(4, 4 + 2 * (tape.SHAPES + 2), 2):
        x = torch.randn(2, 3, size, size)
        first = step(net, x)
        assert same(first, step(net, x)) and same(first, step(net, x))
    assert all(len(tapes.known) == tape.SHAPES for tapes in tape._TAPES.values())


def test_the_shapes_not_used_for_longest_are_forgotten() -> None:
    """Whatever came before, what comes all the time is replayed; and what is used stays."""

    def doubled(size: int) -> bool:
        """Whether Python was left out."""
        calls: list[int] = []
        x = torch.randn(size)

        def function() -> Tensor:
            calls.append(size)
            return x * 2

        assert torch.equal(tape.run("doubled", [x], function), x * 2)
        return not calls

    for size in range(1, tape.SEEN + 2):  # once each
        assert not doubled(size)
    assert [doubled(1000) for _ in range(4)] == [False, False, True, True]
    for size in range(1, tape.SHAPES + 2):  # more than there is room for, beside one that is used all the time
        assert [doubled(size) for _ in range(3)][-1] and doubled(1000)
    assert recorded() == tape.SHAPES
    (tapes,) = tape._TAPES.values()
    assert len(tapes.seen) <= tape.SEEN


def test_the_kind_not_used_for_longest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape, "MOST", 4)
    x = torch.randn(2, 3, 8, 8)
    for scale in range(1, 5):  # another λ is no other kind, another activation is
        net = network()
        net[2] = nn.LeakyReLU(scale / 10)
        racecar.wrap(net, lam=0.1)
        for _ in range(3):
            step(net, x)
    assert len(tape._TAPES) == 4


def test_one_tensor_in_two_places_is_another_call_than_two() -> None:
    """As of a weight that two layers share."""
    for same_one in (True, True, True, False, False, False, True):
        x = torch.randn(3)
        y = x if same_one else torch.randn(3)
        assert torch.equal(tape.run("two places", [x, y], lambda x=x, y=y: x * 2 + y), x * 2 + y)
    assert recorded() == 2


def test_a_number_that_is_looked_at_is_not_recorded() -> None:
    calls = []

    def function() -> Tensor:
        calls.append(1)
        return x + 1 if float(x.sum()) > 0 else x - 1

    for value in (1.0, 1.0, 1.0, -1.0, -1.0):
        x = torch.full((2,), value)
        assert torch.equal(tape.run("looks", [x], function), x + value)
    assert len(calls) == 5 and recorded() == 0
    assert refusals() == ["aten::_local_scalar_dense gives a number, which may decide what is done"]


@pytest.mark.parametrize("memory", ["store", "deferred"])
def test_narrow_linear_layers_are_one_call_already(memory: str) -> None:
    """Asked for through the operator's own functions, as a chain with statistics to report is."""
    s = make_chain("one linear", torch.float32)
    text = str(Chain(tuple(s.layers), tuple(s.last), full=False))
    for _ in range(4):
        x = torch.randn_like(s.x).requires_grad_()
        flat = (x, *s.weights, *s.biases, *s.params)
        out, losses = chain_ops.TiedChain.apply(text, memory, None, 1, *flat)
        assert torch.allclose(out, s.modules(x))
        (out.sum() + losses.sum()).backward()
        assert x.grad is not None and x.grad.isfinite().all()
    assert recorded() == 0 and set(refusals()) == {linear_chain.ONE_CALL}


def test_a_tensor_from_elsewhere_is_not_recorded() -> None:
    other = torch.ones(2)
    for _ in range(4):
        x = torch.randn(2)
        assert torch.equal(tape.run("elsewhere", [x], lambda x=x: x * other), x)
        assert torch.equal(tape.run("given back", [x], lambda: other), other)
    assert recorded() == 0 and len(refusals()) == 2


def test_an_error_while_it_is_recorded_leaves_nothing_behind() -> None:
    x = torch.randn(2)

    def fails() -> Tensor:
        raise KeyError("x")

    for _ in range(3):
        with pytest.raises(KeyError):
            tape.run("fails", [x], fails)
    assert (
        recorded() == 0 and extension.recorder() is None and extension.load() is extension._found(extension.CPP).module
    )


def test_every_tensor_is_let_go_after_its_last_use() -> None:
    """What came in with the only reference to it is gone before the end."""
    alive: list[bool] = []
    seen: list[weakref.ref] = []
    x = torch.randn(4)

    class Watching:
        def __init__(self, tensors: list[Tensor]):
            self.tensors = tensors

        def function(self) -> Tensor:
            doubled = self.tensors[0] * 2
            self.tensors.clear()
            return doubled + 1

    for _ in range(4):
        given = x.clone()
        seen.append(weakref.ref(given.untyped_storage()))
        tensors = [given]
        del given
        own = Watching(list(tensors))
        result = tape.run("lets go", tensors, own.function, own.tensors.clear)
        alive.append(bool(tensors))
        gc.collect()
        assert torch.equal(result, x * 2 + 1)
    assert alive == [True, True, False, False]  # the list is emptied where it is replayed
    assert recorded() == 1


def test_what_nobody_reads_is_left_out() -> None:
    def function() -> Tensor:
        _ = x * 3
        return x + 1

    for _ in range(3):
        x = torch.randn(3)
        assert torch.equal(tape.run("unread", [x], function), x + 1)
    (tapes,) = tape._TAPES.values()
    assert [len(own.tape) for own in tapes.known] == [1]


def test_several_threads_replay_one_tape() -> None:
    chain = make_chain("batch norm", torch.float32)

    def grads(x: Tensor) -> list[Tensor]:
        out, losses = rk.tied_chain(x, *chain.arguments[1:], last=chain.last)
        return list(torch.autograd.grad(out.sum() + losses.sum(), chain.tensors[1:]))

    xs = [torch.randn_like(chain.x) for _ in range(4)]
    want = [grads(x) for x in xs]
    assert recorded() == 2
    found: dict[int, list[list[Tensor]]] = {}
    threads = [threading.Thread(target=lambda i=i: found.setdefault(i, [grads(x) for x in xs * 3])) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and all(same(g, w) for own in found.values() for g, w in zip(own, want * 3, strict=True))


def test_several_threads_record_one_tape() -> None:
    """While one records, the others run."""
    threads_there = threading.Barrier(4)
    tape.run("once", [torch.zeros(3)], lambda: torch.zeros(3))
    found: list[Tensor] = []

    def in_thread() -> None:
        x = torch.ones(3)

        def function() -> Tensor:
            threads_there.wait(10)
            return x + 1

        found.append(tape.run("once", [x], function))

    threads = [threading.Thread(target=in_thread) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(torch.equal(t, torch.full((3,), 2.0)) for t in found)
    assert recorded() == 1


def test_an_error_leaves_the_shapes_to_be_recorded() -> None:
    x = torch.ones(3)

    def fails() -> Tensor:
        raise KeyError("x")

    tape.run("fails once", [x], lambda: x + 1)
    with pytest.raises(KeyError):
        tape.run("fails once", [x], fails)
    assert recorded() == 0
    tape.run("fails once", [x], lambda: x + 1)
    assert recorded() == 1


class Holding:
    """May hold a tensor where nobody finds it."""


@dataclasses.dataclass
class Changing:
    by: float


@dataclasses.dataclass(frozen=True)
class Fixed:
    by: Any


@pytest.mark.parametrize(
    ("argument", "closed"),
    [
        (Fixed(1.5), None), ((torch.float32, [Fixed(("x", None))]), None), (True, None),
        (Holding(), "Holding"), (Changing(1.5), "Changing"), (Fixed(torch.ones(2)), "Fixed"), ([{"by": 1}], "dict"),
    ],
    ids=["frozen", "nested", "number", "object", "not frozen", "frozen tensor", "dict"],
)  # fmt: skip
def test_what_a_launcher_is_given(argument: Any, closed: str | None) -> None:
    """A tensor that is not found would be the same one at every replay."""

    @tape.one_instruction
    def launch(x: Tensor, argument: Any) -> Tensor:
        return x * 2

    for _ in range(3):
        x = torch.randn(2)
        assert torch.equal(tape.run("given", [x], lambda x=x: launch(x, argument)), x * 2)
    assert recorded() == (closed is None)
    assert [f"is given {closed}, in which" in why for why in refusals()] == [True] * (closed is not None)


def test_kernels_of_triton_are_launched_again(interpreted: Any) -> None:
    """They are launched by Python, between operators that are not."""
    net = racecar.wrap(network().to(DEVICE), lam=0.1, backend="triton")
    x = torch.randn(2, 3, 8, 8, device=DEVICE)
    first = step(net, x)
    assert same(first, step(net, x)) and same(first, step(net, x))
    assert recorded() == 2 and refusals() == []


@pytest.mark.parametrize("of", ["matrices", "convolutions"])
@pytest.mark.parametrize("backend", ["triton:fused", "triton"])
def test_another_precision_of_products_is_another_call(
    of: str, backend: str, interpreted: Any, precision_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is launched is told it, and whether anything is: by a table that has the classes of TF32 alone."""
    from racecar_kernels.gpu import chooser, configs

    layer, shape = (nn.Linear(16, 8), (4,)) if of == "matrices" else (nn.Conv2d(16, 8, 1), (2, 3, 3))
    layer.to(DEVICE)
    seen: list[str] = []
    for name, own in (("linear", configs.linear), ("gemm", configs.gemm)):

        def noted(kernel: str, math: str, *rest: Any, right: Any = own) -> Any:
            seen.append(math)
            return right(kernel, math, *rest)

        monkeypatch.setattr(configs, name, noted)
    won = {chooser.linear_class("forward", "tf32", (8, 16)), chooser.shape_class("forward", "tf32", 1, (8, 16), 1)}
    architecture = chooser.device.of(layer.weight).architecture
    monkeypatch.setattr(chooser, "MEASURED", {architecture: frozenset(won)})
    y, d = (torch.randn(*shape, channels, device=DEVICE).movedim(-1, 1) for channels in (8, 16))  # channels_last
    for precision in ("ieee", "ieee", "ieee", "tf32", "tf32", "tf32", "ieee"):
        precision_of(of, precision)
        seen.clear()
        rk.reverse_layer(y, d, layer.weight, layer.bias, backend=backend)
        chosen = backend == "triton:fused" or precision == "tf32"
        assert set(seen) == ({precision} if chosen else set())
    assert recorded() == 2 and refusals() == []
