"""Networks that train on the Triton backend, on a GPU or, without one, in Triton's interpreter on the CPU.

Where there is no GPU, a CUDA graph's replay is the step itself, and synchronising is what reads a number on the host.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator

import oracle
import pytest
import torch
from chains import Sample, describe_chain, make
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import racecar
import racecar_kernels as rk

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.usefixtures("interpreted", "poisoned", "without_tf32")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POLICIES = [("full", "store"), ("full", "recompute"), ("local", "store"), ("local", "deferred")]
each_policy = pytest.mark.parametrize(("variant", "memory"), POLICIES)
COMPILED = "inductor" if DEVICE == "cuda" else "aot_eager"
LAST = torch.channels_last
WARM = 3 if DEVICE == "cuda" else 1  # steps before one is captured
SEEDS = range(7)


@pytest.fixture
def without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2),
    ).to(DEVICE, dtype, memory_format=LAST)  # fmt: skip


def images(dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    x = torch.randn(2, 2, 4, 5, generator=torch.Generator().manual_seed(seed))
    return x.to(DEVICE, dtype, memory_format=LAST)


def wrapped(dtype: torch.dtype = torch.float32, backend: str | None = "triton", **settings: str) -> nn.Module:
    return racecar.wrap(network(dtype), 0.1, backend=backend, **settings)


def gradients(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Of the input and of every parameter."""
    x = x.detach().requires_grad_()
    return list(torch.autograd.grad(net(x).float().square().sum() + net.reverse_loss, [x, *net.parameters()]))


def deferred_gradients(net: nn.Module, x: Tensor) -> list[Tensor]:
    """The same by `backward`, which alone runs what was put off."""
    x = x.detach().requires_grad_()
    net.zero_grad()
    (net(x).float().square().sum() + net.reverse_loss).backward()
    return [t.grad for t in (x, *net.parameters())]


# ------------------------------------------------------------------------------------------- values


ONE_NUMBER = torch.finfo(torch.float32).eps / 4  # less than rounding a single result to float32 costs on average


def check(ours: list[float], plain: list[float]) -> None:
    """At most twice plain PyTorch's own error, in the median of all seeds."""
    own, theirs = statistics.median(ours), statistics.median(plain)
    assert own <= max(2 * theirs, ONE_NUMBER), f"an error of {own:.2e}, plain PyTorch's is {theirs:.2e}"


def chained(name: str, dtype: torch.dtype, seed: int) -> tuple[Sample, Sample]:
    """A chain in float64 on the CPU, and the same numbers in `dtype` on the device."""
    ours = make(name, dtype, seed, last=True)
    ours = describe_chain(ours.modules.to(DEVICE), ours.x.detach().to(DEVICE).requires_grad_())
    exact = make(name, torch.float64, seed, last=True)
    for a, b in zip(exact.tensors, ours.tensors, strict=True):
        a.data.copy_(b.data)
    return exact, ours


def chain_gradients(s: Sample, backend: str, memory: str) -> list[Tensor]:
    variant = "local" if memory == "deferred" else "full"
    out, losses = rk.tied_chain(*s.arguments, last=s.last, variant=variant, memory=memory, backend=backend)
    return list(torch.autograd.grad(out.float().square().sum() + losses.float().sum(), s.tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory", ["store", "deferred"])
@pytest.mark.parametrize("name", ["mlp", "pooled, odd", "batch norm", "strided", "up-sampled"])
def test_a_tied_chain_against_float64(name: str, memory: str, dtype: torch.dtype) -> None:
    ours, plain = [], []
    for seed in SEEDS:
        exact, sample = chained(name, dtype, seed)
        want = chain_gradients(exact, "reference", memory)
        for errors, backend in ((ours, "triton"), (plain, "reference")):
            got = chain_gradients(sample, backend, memory)
            errors.append(oracle.error([g.cpu() for g in got], want))
    check(ours, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_policy
def test_a_wrapped_network_against_float64(variant: str, memory: str, dtype: torch.dtype) -> None:
    exact, ours, plain = (
        wrapped(d, backend, variant=variant, memory=memory)
        for d, backend in ((torch.float64, "reference"), (dtype, "triton"), (dtype, "reference"))
    )
    for a, b in zip(exact.parameters(), ours.parameters(), strict=True):
        a.data.copy_(b.data)
    errors: dict[nn.Module, list[float]] = {ours: [], plain: []}
    for seed in SEEDS:
        x = images(dtype, seed)
        want = deferred_gradients(exact, x.double())
        for net, own in errors.items():
            own.append(oracle.error(deferred_gradients(net, x), want))
    check(errors[ours], errors[plain])


def test_autocast() -> None:
    """bfloat16 by autocast, against plain PyTorch under autocast."""
    exact, errors = wrapped(torch.float64, "reference"), {}
    for backend in ("triton", "reference"):
        net, errors[backend] = wrapped(backend=backend), []
        for seed in SEEDS:
            x = images(seed=seed)
            want = deferred_gradients(exact, x.double())
            net.zero_grad()
            with torch.autocast(DEVICE, torch.bfloat16):
                loss = net(x).float().square().sum() + net.reverse_loss
            loss.backward()
            errors[backend].append(oracle.error([p.grad for p in net.parameters()], want[1:]))
    check(errors["triton"], errors["reference"])


def test_nan_and_infinity_reach_what_they_reach_in_plain_pytorch() -> None:
    for value in (float("nan"), float("inf")):
        x, found = images(), []
        x[0, 1, 2, 3] = value
        for backend in ("triton", "reference"):
            net = wrapped(backend=backend)
            found.append([net(x), net.reverse_loss, *gradients(net, x)])
        for got, want in zip(*found, strict=True):
            assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isfinite(), want.isfinite())


# ------------------------------------------------------------------------------------------- layouts


def cut_out(x: Tensor) -> Tensor:
    """The same numbers, unaligned, with gaps between rows and images."""
    n, c, h, w = x.shape
    wide = x.new_full((n, h + 1, w + 3, c + 1), float("nan"))[:, 1:, 1:-2, 1:].movedim(-1, 1)
    return wide.copy_(x)


@each_policy
def test_an_unaligned_slice_gives_what_its_copy_gives(variant: str, memory: str) -> None:
    net = wrapped(variant=variant, memory=memory)
    net.eval()[1].train()  # one batch norm, whose running statistics do not enter
    x = images()
    for got, want in zip(deferred_gradients(net, cut_out(x)), deferred_gradients(net, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_channels_last_is_kept() -> None:
    model = nn.Sequential(*network()[:3])
    x = images().requires_grad_()
    want = model(x)
    net = racecar.wrap(model, 0.1, backend="triton")
    got = net(x)
    assert got.stride() == want.stride() and got.is_contiguous(memory_format=LAST)
    for t, grad in zip((x, model[0].weight), gradients(net, x), strict=False):
        assert grad.stride() == t.stride()


# ------------------------------------------------------------------------------------------- a whole step


def trainer(net: nn.Module, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        (net(x).square().mean() + 0.01 * net.reverse_loss).backward()
        optimizer.step()

    return step


@each_policy
def test_two_runs_are_equal_bit_by_bit(variant: str, memory: str) -> None:
    runs = []
    for _ in range(2):
        net = wrapped(variant=variant, memory=memory)
        step = trainer(net, images())
        for _ in range(2):
            step()
        runs.append(list(net.state_dict().values()))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def merely_warm(step: Callable[[], None], warm: int) -> Callable[[], None]:
    for _ in range(warm):
        step()
    return step


def captured(step: Callable[[], None], warm: int) -> Callable[[], None]:
    """The step as a CUDA graph, after so many steps outside of one."""
    if DEVICE == "cpu":
        return merely_warm(step, warm)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@each_policy
def test_a_captured_step_equals_the_step(variant: str, memory: str) -> None:
    """λ is changed between two replays, and takes effect."""
    found = []
    for capture in (captured, merely_warm):
        net = wrapped(variant=variant, memory=memory)
        replay = capture(trainer(net, images()), WARM)
        for lam in (0.1, 0.4):
            net.lam = lam
            replay()
        found.append(list(net.state_dict().values()))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("variant", "memory"), POLICIES[:3])
def test_compiles_in_one_piece_and_once(variant: str, memory: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(COMPILED)
    net, plain = (wrapped(variant=variant, memory=memory) for _ in range(2))
    x = images()
    step = torch.compile(lambda x: net(x).square().sum() + net.reverse_loss, fullgraph=True, backend=counter)
    for lam in (0.1, [0.5, 0.2], 0.7):
        net.lam = plain.lam = lam
        got = torch.autograd.grad(step(x), list(net.parameters()))
        want = torch.autograd.grad(plain(x).square().sum() + plain.reverse_loss, list(plain.parameters()))
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


class NothingIsRead(TorchDispatchMode):
    """Fails where a number is read on the host, as a GPU's queue would have to be waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero"), name
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    if DEVICE == "cpu":
        with NothingIsRead():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("reduction", ["l2", "mean"])
@each_policy
def test_no_step_waits_for_the_device(variant: str, memory: str, reduction: str) -> None:
    net = wrapped(variant=variant, memory=memory, reduction=reduction)
    step = trainer(net, images())
    step()  # the first one moves λ to the device
    with no_synchronisation():
        step()
