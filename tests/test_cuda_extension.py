"""The functions of `_CUDA`: what they refuse (no GPU is needed for that), and on a GPU what they compute."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from racecar_kernels import extension

MODULE = extension.load(extension.CUDA)
pytestmark = pytest.mark.skipif(MODULE is None, reason=str(extension.why_not(extension.CUDA)))

SHAPES = [((3, 2, 3, 3), (2, 2)), ((5, 1, 4, 2), (3, 1)), ((1, 7, 1, 1), (1, 4)), ((64, 33, 5, 5), (2, 3))]


def folded(weight: Tensor, factor: tuple[int, int]) -> Tensor:
    """W_f[t] = Σ_{i < f} W[t − i], as a transposed convolution with ones."""
    ones = weight.new_ones(1, 1, *factor)
    flat = F.conv_transpose2d(weight.reshape(-1, 1, *weight.shape[2:]), ones)
    return flat.view(*weight.shape[:2], *flat.shape[2:])


def test_facts_tell_how_it_was_built() -> None:
    facts = MODULE.build_facts()
    assert facts["torch"] == torch.__version__.split("+")[0]
    assert facts["cuda"][0] == int(torch.version.cuda.split(".")[0])
    assert facts["codes"] and all(code.startswith(("sm_", "compute_")) for code in facts["codes"])
    assert facts["cxx"] >= 201703 and facts["compiler"] != "unknown"


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (
            lambda: MODULE.fold(torch.zeros(2, 3, 4, 4), (2, 2)),
            ValueError,
            "weight must be on an NVIDIA GPU, it is on cpu",
        ),
        (
            lambda: MODULE.fold_adjoint(torch.zeros(2, 3, 4, 4), (2, 2), torch.half),
            ValueError,
            "grad must be on an NVIDIA",
        ),
        (
            lambda: MODULE.fold_adjoint(torch.zeros(2, 3, 4, 4).double(), (2, 2), torch.half),
            TypeError,
            "grad must be float32, got Double",
        ),
        (lambda: MODULE.fold(torch.zeros(2, 3, 4, 4), (2, 2, 2)), TypeError, "incompatible function arguments"),
    ],
)
def test_what_it_cannot_serve_is_refused(call, error, says: str) -> None:
    with pytest.raises(error, match=says):
        call()


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "factor"), SHAPES)
def test_folding_is_as_exact_as_plain_pytorch(shape, factor, dtype, layout) -> None:
    """Norm-wise against float64, median of nine seeds: at most twice plain PyTorch's error."""
    grown = tuple(n + f - 1 for n, f in zip(shape[2:], factor, strict=True))
    pairs: list[list[tuple[float, float]]] = [[], []]
    for seed in range(9):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(shape, generator=generator).to("cuda", dtype).to(memory_format=layout)
        grad = torch.randn((*shape[:2], *grown), generator=generator).cuda().to(memory_format=layout)
        exact, plain = folded(weight.double(), factor), folded(weight, factor)
        adjoint = torch.autograd.functional.vjp(lambda w: folded(w, factor), weight.double(), grad.double())[1]
        plain_adjoint = torch.autograd.functional.vjp(lambda w: folded(w, factor), weight.float(), grad)[1].to(dtype)
        for found, got, same, want in zip(
            pairs,
            (MODULE.fold(weight, factor), MODULE.fold_adjoint(grad, factor, dtype)),
            (plain, plain_adjoint),
            (exact, adjoint),
            strict=True,
        ):
            assert got.dtype == dtype and got.shape == want.shape
            found.append((float((got.double() - want).norm()), float((same.double() - want).norm())))
    for found in pairs:
        ours, theirs = (statistics.median(errors) for errors in zip(*found, strict=True))
        assert ours <= 2 * theirs


@pytest.mark.gpu
def test_bad_arguments_on_a_gpu_are_sentences() -> None:
    weight = torch.zeros(2, 3, 4, 4, device="cuda")
    with pytest.raises(ValueError, match="factor must be at least 1 in both directions, got .0, 2."):
        MODULE.fold(weight, (0, 2))
    with pytest.raises(ValueError, match="weight must have 4 dimensions"):
        MODULE.fold(weight[0], (2, 2))
    with pytest.raises(ValueError, match="grad has 4 rows, too few for a factor of 5"):
        MODULE.fold_adjoint(weight, (5, 1), torch.float32)
    with pytest.raises(ValueError, match=r"2\^31"):
        MODULE.fold(torch.zeros(1, 1, 1, 1, device="cuda").expand(2**20, 2**11, 1, 1), (1, 1))
    with pytest.raises(TypeError, match="weight must be float32, bfloat16 or float16, got Double"):
        MODULE.fold(weight.double(), (2, 2))
    assert MODULE.fold(weight[:0], (2, 2)).shape == (0, 3, 5, 5)


@pytest.mark.gpu
def test_it_runs_on_the_current_stream() -> None:
    weight = torch.ones(64, 64, 3, 3, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        weight.mul_(2)
        got = MODULE.fold(weight, (2, 2))
    stream.synchronize()
    assert torch.equal(got, folded(torch.full_like(weight, 2.0), (2, 2)))
