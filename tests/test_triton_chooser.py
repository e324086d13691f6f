"""Who computes a layer's convolutions on the Triton backend: the table, and the two backends that override it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_triton_backend import POLICIES, check_layer, check_network, gradients, network
from torch import Tensor

import racecar
import racecar_kernels as rk
from racecar_kernels.backends import ON_REQUEST, by_name
from racecar_kernels.gpu import chooser, transposed
from racecar_kernels.layer import Tied

pytestmark = pytest.mark.usefixtures("interpreted", "poisoned", "without_tf32")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAST = torch.channels_last
LAYERS = ["conv", "batch norm, relu", "pooled, cut", "source pooled", "strided, odd"]
ROW: dict[str, Any] = {
    "architecture": "sm_90", "dtype": "bfloat16", "pass": "forward", "kernel": [3, 3], "stride": [1, 1], "factor": None,
    "c_in": 64, "c_out": 48, "groups": 1, "library_us": 10.0, "fused_us": 8.0,
}  # fmt: skip


@pytest.fixture
def without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, unrecorded: None) -> list[str]:
    """Names of the fused launches since."""
    names: list[str] = []
    for name in ("forward", "source_gradient", "weight_gradient"):
        right = getattr(transposed, name)

        def launch(*args: Any, name: str = name, right: Any = right, **kwargs: Any) -> Any:
            names.append(name)
            return right(*args, **kwargs)

        monkeypatch.setattr(transposed, name, launch)
    return names


@pytest.mark.parametrize("name", LAYERS)
def test_a_fused_reverse_layer_against_float64(name: str, launched: list[str]) -> None:
    check_layer(name, "triton:fused", memory_format=LAST)
    assert launched.count("forward") == 7


@pytest.mark.parametrize(("variant", "memory"), POLICIES)
def test_a_fused_network_against_float64(variant: str, memory: str, launched: list[str]) -> None:
    check_network("triton:fused", variant=variant, memory=memory)
    assert {"forward", "source_gradient", "weight_gradient"} == set(launched)


@pytest.mark.parametrize("backend", ["triton", "triton:library"])
def test_nothing_is_fused_unless_it_was_measured(backend: str, launched: list[str]) -> None:
    gradients(backend, torch.float32, 0, variant="full", memory="store")
    assert launched == []


def test_the_table_decides(monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    """One pass of one class alone, or two."""
    architecture = chooser.device.of(torch.empty(0, device=DEVICE)).architecture
    monkeypatch.setattr(chooser, "MEASURED", {architecture: frozenset([class_of_the_network("source")])})
    gradients("triton", torch.float32, 0, variant="local", memory="store")
    assert set(launched) == {"source_gradient"}
    launched.clear()
    both = frozenset([class_of_the_network("source"), class_of_the_network("weight")])
    monkeypatch.setattr(chooser, "MEASURED", {architecture: both})
    gradients("triton", torch.float32, 0, variant="local", memory="store")
    assert set(launched) == {"source_gradient", "weight_gradient"}


def class_of_the_network(pass_: str) -> str:
    """Of the first layer of `test_triton_backend.network`."""
    return chooser.shape_class(pass_, "ieee", 9, (4, 2), 1)


def test_a_table_from_measured_rows() -> None:
    slower = {**ROW, "fused_us": 12.0}
    rows = [
        ROW,
        {**ROW, "pass": "source"}, {**slower, "pass": "source"},  # won once, lost once
        {**ROW, "pass": "weight", "wrong": "off by 1"}, {**ROW, "pass": "weight", "fused_us": None},
        {**ROW, "architecture": "interpreter"},
        {**ROW, "dtype": "float32", "factor": [2, 2]},
        {**ROW, "pass": "tied", "kernel": [], "stride": []}, {**slower, "kernel": [], "stride": []},  # linear layers
    ]  # fmt: skip
    assert chooser.faster(rows) == {
        "sm_90": {
            "forward half 9 taps 64 to 64 channels stride 1",
            "tied half linear 64 to 64 features",
            "forward tf32 9 taps 64 to 64 channels stride 2",
        }
    }


def test_the_plan_shows_it() -> None:
    fused = str(racecar.wrap(network(), 0.1, backend="triton:fused").plan)
    assert fused.count("triton:fused, fused forward, source, weight") == 2
    assert str(racecar.wrap(network(), 0.1, backend="triton").plan).count("triton, library") == 2


def test_what_is_not_served_goes_to_the_library() -> None:
    weight = torch.randn(4, 3, 3, 3, device=DEVICE).to(memory_format=LAST)
    y = chooser.Lazy(torch.randn(2, 4, 5, 5, device=DEVICE))  # contiguous
    fused = chooser.fused(chooser.always)
    tied = Tied((1, 1), ((1, 1), (1, 1)), (1, 1))
    given = {"bias": None, "factor": None, "d": None, "window": None}
    assert not fused.takes("forward", weight[..., 0], Tied((1,), ((1, 1),), (1,)), None)  # one-dimensional
    assert fused.forward(y, weight, tied, (2, 3, 5, 5), **given) is None
    last = chooser.Lazy(y.x.to(memory_format=LAST))
    assert isinstance(fused.forward(last, weight, tied, (2, 3, 5, 5), **given).kept, Tensor)
    assert fused.forward(last, weight, Tied((1, 1), ((2, 2), (2, 2)), (2, 2)), (2, 3, 5, 5), **given) is None


def test_names_on_request_are_not_chosen() -> None:
    assert rk.backends() == ("cpp", "triton", "reference")
    assert [b.name for b in ON_REQUEST] == ["triton:fused", "triton:library", "cuda"]
    with pytest.raises(ValueError, match="'triton:other'"):
        by_name("triton:other")
