"""What a library computes where the CUDA kernels between few and many channels run out of memory (`by_library.py`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_host import Folding, launch_few_channels
from test_cuda_few_channels import CASES, IDS, Made, compare, forward, gradients
from torch import Tensor

from racecar_kernels.cuda import few_channels, few_operands

pytestmark = pytest.mark.usefixtures("poisoned", "_on_host")


@pytest.fixture
def _on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_operands, "DEVICES", ["cpu"])
    monkeypatch.setattr(few_operands, "launch", launch_few_channels)
    monkeypatch.setattr(few_operands, "folding", lambda like: Folding())


@torch.no_grad()  # as an autograd function is run
def by_library(made: Made, what: str) -> dict[str, Tensor]:
    """What the family gives where every launch runs out of memory."""
    case, fused = made.case, few_channels.fused()
    if what == "forward":
        got = fused.forward(
            made.y, made.weight, case.tied, case.shape, bias=made.bias, factor=case.factor, act=case.act[0],
            args=case.act[1], keep=case.keep, d=made.d, window=case.window, source=True, minus=made.minus,
        )  # fmt: skip
        return {name: t for name, t in got._asdict().items() if t is not None}
    reverse = (made.incoming, made.y, made.bias)
    kept = [t.clone() for t in (made.g, made.latent.x, made.d.x, made.y.x)]
    source, bias = fused.source_gradient(
        made.incoming, made.weight, case.tied, tuple(made.y.x.shape), factor=case.factor, bias=case.bias
    )
    weight = fused.weight_gradient(made.weight, case.tied, reverse=reverse, factor=case.factor)
    assert all(map(torch.equal, kept, (made.g, made.latent.x, made.d.x, made.y.x)))
    return {"source": source, "reverse": weight, **({"bias": bias} if case.bias else {})}


LIBRARY = ["one", "four", "stride", "folded_rows", "pooled", "nothing_kept", "from_one", "from_four_folded", "float16"]


@pytest.mark.parametrize("what", ["forward", "gradients"])
@pytest.mark.parametrize("name", LIBRARY)
def test_without_memory_a_library_gives_the_same(name: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernels' types and strides, and as exact as is asked of them."""

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    case = CASES[IDS.index(name)]
    made = Made(case, 0, "cpu")
    want = forward(made) if what == "forward" else gradients(made)
    monkeypatch.setattr(few_operands, "launch", full)
    for key, t in by_library(made, what).items():
        assert (t.dtype, t.stride()) == (want[key].dtype, want[key].stride()), key
    compare(case, "cpu", lambda made: by_library(made, what), "forward" if what == "forward" else "reverse")
