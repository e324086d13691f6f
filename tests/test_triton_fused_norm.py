"""A batch norm's statistics from the epilogue of the fused transposed convolution, against float64."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn

import racecar
from racecar_kernels.fused import Affine
from racecar_kernels.layer import Tied
from racecar_kernels.lazy import BatchNorm, Lazy
from racecar_kernels.pointwise_ref import batch_norm_ref

pytest.importorskip("triton", reason="Triton is not installed")
from racecar_kernels.gpu import configs, norm_kernels, pointwise, transposed

pytestmark = pytest.mark.usefixtures("interpreted", "poisoned", "without_tf32")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAST = torch.channels_last
ONE_NUMBER = torch.finfo(torch.float32).eps / 4  # less than rounding a single result to float32 costs on average
POLICIES = [("full", "store"), ("full", "recompute"), ("local", "store"), ("local", "deferred")]


@pytest.fixture
def without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@dataclass(frozen=True)
class Case:
    """A layer that read (N, C_in, H, W) and gives C_out channels; `origin` is how far u lies from 0, in deviations."""

    name: str
    shape: tuple[int, int, int, int]
    out: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    groups: int = 1
    factor: tuple[int, int] | None = None
    affine: bool = True
    origin: float = 0.0
    dtype: torch.dtype = torch.float32


CASES = [
    Case("ragged", (3, 5, 5, 6), 10),
    Case("several blocks", (5, 20, 9, 8), 17, 1, padding=0, affine=False),
    Case("whole blocks", (2, 16, 8, 8), 16, 1, padding=0),
    Case("one pixel", (3, 4, 1, 1), 18, 1, padding=0),
    Case("strided", (2, 6, 7, 8), 9, stride=2),
    Case("strided, taps missing", (2, 3, 7, 6), 18, 1, stride=2, padding=0),
    Case("phases beside channels", (2, 5, 9, 8), 6, 4, stride=2),
    Case("up-sampled", (2, 3, 6, 8), 20, factor=(2, 2)),
    Case("up-sampled in rows", (1, 20, 6, 5), 9, factor=(2, 1)),
    Case("groups", (2, 6, 4, 5), 10, groups=2),
    Case("groups, strided", (2, 4, 6, 6), 4, 2, stride=2, padding=0, groups=2),
    Case("far from 0", (4, 3, 9, 7), 20, 1, padding=0, origin=1e3),
    Case("very far from 0", (4, 3, 9, 7), 20, 1, padding=0, origin=1e5),
    Case("bfloat16", (2, 5, 7, 6), 10, dtype=torch.bfloat16),
    Case("bfloat16, far from 0", (2, 3, 7, 6), 20, 1, padding=0, origin=30.0, dtype=torch.bfloat16),
    Case("bfloat16, up-sampled", (1, 3, 6, 6), 20, factor=(2, 2), dtype=torch.bfloat16),
]


def run(case: Case, seed: int) -> tuple[Tensor, BatchNorm, Affine]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    tied = Tied((case.stride,) * 2, ((case.padding,) * 2,) * 2, (1, 1), case.groups)
    size = tied.output_size(case.shape[2:], (case.kernel,) * 2)
    small = [n // f for n, f in zip(size, case.factor or (1, 1), strict=True)]
    y = random(case.shape[0], case.out, *small)
    if case.origin:  # one value that every output adds, with a weight of 1
        y[:, 0] = case.origin
    weight = random(case.out, case.shape[1] // case.groups, case.kernel, case.kernel)
    if case.origin:
        weight[0] = case.out**0.5
    of = Affine(None, None, 1e-5)
    if case.affine:
        of = Affine(*(random(case.shape[1], dtype=torch.float32) for _ in range(2)), 1e-5)
    y, weight = (t.to(memory_format=LAST) for t in (y, weight))
    found = transposed.forward(Lazy(y), weight, tied, case.shape, factor=case.factor, keep="u", norm=of)
    assert found.kept is not None and found.norm is not None
    return found.kept, found.norm, of


@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_statistics_against_float64(case: Case) -> None:
    """Of u as it is stored: at most twice as far off as plain PyTorch's, in the median of seven seeds."""
    errors: dict[str, list[tuple[float, float]]] = {name: [] for name in BatchNorm._fields}
    for seed in range(7):
        u, norm, of = run(case, seed)
        plain = batch_norm_ref(u, *of)
        wide = (None if t is None else t.double() for t in of[:2])
        exact = batch_norm_ref(u.double(), *wide, of.eps)
        for name, own in errors.items():
            want = [getattr(exact, name)]
            own.append((oracle.error([getattr(norm, name)], want), oracle.error([getattr(plain, name)], want)))
    for name, own in errors.items():
        ours, theirs = map(statistics.median, zip(*own, strict=True))
        assert ours <= max(2 * theirs, ONE_NUMBER), f"{name}: {ours:.2e}, plain PyTorch's is {theirs:.2e}"


@pytest.mark.parametrize(("name", "stages"), [("ragged", 0), ("strided", 1), ("several blocks", 2)])
def test_parts_are_combined_before_they_are_finished(name: str, stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more parts than one program takes, each of them by several: 2, 4 and 6 where 2 may be left."""
    monkeypatch.setattr(configs, "MOST_PARTS", 2)
    stage = at_kernel(monkeypatch, norm_kernels, "combine_parts_kernel")
    case = next(c for c in CASES if c.name == name)
    run(case, 0)
    assert len(stage) == stages
    test_statistics_against_float64(case)


def test_it_repeats_itself() -> None:
    (u, norm, _), (again, same, _) = (run(CASES[0], 0) for _ in range(2))
    assert torch.equal(u, again) and all(torch.equal(a, b) for a, b in zip(norm, same, strict=True))


@pytest.mark.parametrize("kernel", ["fused", "pointwise"])
@pytest.mark.parametrize("values", [(torch.nan,), (torch.inf,), (-torch.inf,), (torch.inf, -torch.inf)], ids=str)
def test_nan_and_infinity_come_out_as_in_plain_pytorch(values: tuple[float, ...], kernel: str) -> None:
    """The mean that `nn.BatchNorm2d` keeps, and the deviation, of channels with none, one, or one in two blocks.

    Every channel is a group, so that inf · 0 is nowhere but in columns of a block that are not stored.
    """
    u = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(0)).to(DEVICE, memory_format=LAST)
    u[0, 0, 1, 1] = u[0, 1, 1, 1] = values[0]
    u[2, 1, 5, 5] = values[-1]
    norm = pointwise.batch_norm(u, None, None, 1e-5)
    if kernel == "fused":
        weight, tied = torch.ones(3, 1, 1, 1, device=DEVICE), Tied((1, 1), ((0, 0), (0, 0)), (1, 1), 3)
        found = transposed.forward(Lazy(u), weight, tied, tuple(u.shape), keep="u", norm=Affine(None, None, 1e-5))
        torch.testing.assert_close(found.kept, u, equal_nan=True)
        norm = found.norm
    _, mean, rstd = torch.native_batch_norm(u, None, None, None, None, True, 0.1, 1e-5)
    torch.testing.assert_close(norm.mean, mean, equal_nan=True)
    for got in (norm.rstd, norm.scale):
        torch.testing.assert_close(got, rstd, equal_nan=True)
    torch.testing.assert_close(norm.shift.isnan(), rstd.isnan())


def test_a_norm_needs_u_to_be_kept() -> None:
    y, weight = (torch.ones(1, 1, 1, 1, device=DEVICE) for _ in range(2))
    with pytest.raises(ValueError, match='keep="a"'):
        transposed.forward(Lazy(y), weight, Tied((1, 1), ((0, 0),) * 2, (1, 1)), (1, 1, 1, 1),
                           norm=Affine(None, None, 1e-5))  # fmt: skip


# ------------------------------------------------------------------------------------------- in a network


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 2, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3), nn.Tanh(),
        nn.Conv2d(3, 2, 1),
    )  # fmt: skip


def gradients(backend: str, dtype: torch.dtype, seed: int, **settings: Any) -> list[Tensor]:
    net = racecar.wrap(network(seed).to(DEVICE, dtype, memory_format=LAST), 0.1, backend=backend, **settings)
    x = torch.randn(2, 2, 4, 5, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype, memory_format=LAST)
    x.requires_grad_()
    (net(x).square().sum() + net.reverse_loss).backward()
    return [t.grad.cpu() for t in (x, *net.parameters())]


def at_kernel(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[int]:
    """Grows by one for every launch of a kernel."""
    launches: list[int] = []
    kernel = getattr(module, name)

    class Counted:
        def __getitem__(self, grid: Any) -> Any:
            launches.append(1)
            return kernel[grid]

    monkeypatch.setattr(module, name, Counted())
    return launches


@pytest.mark.parametrize(("variant", "memory"), POLICIES)
def test_a_fused_network_with_norms_against_float64(variant: str, memory: str) -> None:
    errors = []
    for seed in range(7):
        want = gradients("reference", torch.float64, seed, variant=variant, memory=memory)
        names = ("triton:fused", "reference")
        given = [gradients(name, torch.float32, seed, variant=variant, memory=memory) for name in names]
        errors.append([oracle.error(g, want) for g in given])
    ours, plain = map(statistics.median, zip(*errors, strict=True))
    assert ours <= 2 * plain, f"an error of {ours:.2e}, plain PyTorch's is {plain:.2e}"


@pytest.mark.parametrize(("variant", "memory"), POLICIES)
def test_u_is_not_read_again_for_its_statistics(variant: str, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many norms are finished as with the library, but two fewer passes (or more, made again) read for them."""
    reads, ends = (
        at_kernel(monkeypatch, module, name)
        for module, name in ((pointwise.kernels, "sums_kernel"), (norm_kernels, "finish_norm_kernel"))
    )
    counted = {}
    for backend in ("triton:library", "triton:fused"):
        gradients(backend, torch.float32, 0, variant=variant, memory=memory)
        counted[backend] = len(reads), len(ends)
        reads.clear(), ends.clear()
    (library, ends_library), (fused, ends_fused) = counted.values()
    assert ends_fused == ends_library >= 4
    assert fused <= library - (ends_library - 2)  # the forward's two norms alone still read
