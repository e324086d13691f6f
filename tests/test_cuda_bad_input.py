"""What the CUDA kernels cannot run on: a sentence where they are asked for by name, a slower correct path otherwise.

What the compiled module, the driver and PyTorch report is faked, so that every case is met without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_triton_backend import check_layer
from torch import Tensor

import racecar_kernels as rk
from racecar_kernels import cuda_toolkit, extension
from racecar_kernels.backends import choose
from racecar_kernels.cuda import few_channels, few_operands
from racecar_kernels.cuda.parameters import FewParams
from racecar_kernels.gpu import chooser
from racecar_kernels.layer import Layer, Tied
from racecar_kernels.lazy import Lazy

pytest.importorskip("triton", reason="Triton is not installed")
LAST = torch.channels_last
TIED = Tied((1, 1), ((1, 1), (1, 1)), (1, 1))
ON_CUDA = rk.Query(Layer(TIED), "cuda", torch.float32)
MODULE: Any = object()
BUILT = extension._Found(MODULE, facts={"torch": "2.0", "cuda": (13, 0), "codes": ("sm_80", "sm_90")})
WITHOUT = extension._Found(None, "not built: this PyTorch, 2.0, is one without CUDA")

Fake = Callable[..., None]


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """`faked(found, driver, gpus)`: the module as the loader found it, the driver's CUDA, every GPU's capability."""

    def fake(
        found: Any, driver: tuple[int, int] | None = (13, 0), gpus: tuple[tuple[int, int], ...] = ((9, 0),)
    ) -> None:
        monkeypatch.setattr(extension, "_found", lambda name: found)
        monkeypatch.setattr(cuda_toolkit, "driver_version", lambda: driver)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: gpus[index or 0])
        extension._of_gpu.cache_clear()

    yield fake
    extension._of_gpu.cache_clear()


@pytest.mark.parametrize(
    ("found", "driver", "gpus", "says", "instead"),
    [
        (WITHOUT, (13, 0), ((9, 0),), "not built: this PyTorch, 2.0, is one without CUDA", "triton"),
        (BUILT, (12, 9), ((9, 0),), "it needs a driver for CUDA 13, the one installed serves CUDA 12.9", "triton"),
        (BUILT, (13, 0), ((7, 5),), "need a GPU from sm_80 on, this one is sm_75", "reference"),
        (BUILT, (13, 0), ((12, 0),), "it was compiled for the GPUs sm_80, sm_90, this one is sm_120", "triton"),
        (BUILT, None, (), "no GPU is visible, and no NVIDIA driver is installed", "triton"),
    ],
    ids=["a build without CUDA", "an old driver", "an old GPU", "another GPU", "none"],
)
def test_asked_for_by_name_it_is_a_sentence_and_else_another_backend(
    faked: Fake, found: Any, driver: Any, gpus: Any, says: str, instead: str
) -> None:
    faked(found, driver, gpus)
    assert says in (rk.why_not("cuda", ON_CUDA) or "")
    with pytest.raises(ValueError, match=f"backend 'cuda' cannot serve this layer: .*{says}"):
        choose(ON_CUDA, "cuda")
    assert choose(ON_CUDA).name == instead


def test_where_all_is_there_nothing_is_against_it(faked: Fake) -> None:
    faked(BUILT)
    assert rk.why_not("cuda", ON_CUDA) is None and choose(ON_CUDA, "cuda").name == "cuda"
    assert choose(ON_CUDA).name == "triton"  # not by itself


def test_every_gpu_is_asked_for_itself(faked: Fake) -> None:
    faked(BUILT, gpus=((9, 0), (7, 5)))
    assert few_operands.why_not_device("cuda", 0) is None
    assert "from sm_80 on, this one is sm_75" in (few_operands.why_not_device("cuda", 1) or "")


def test_a_launch_without_the_module_says_what_is_missing(faked: Fake) -> None:
    faked(WITHOUT)
    with pytest.raises(RuntimeError, match="the CUDA kernels are not there: not built: this PyTorch, 2.0"):
        few_operands.launch(few_operands.NARROW, 3, FewParams(), torch.zeros(1))


@pytest.mark.parametrize("elsewhere", ["y", "d", "weight"])
def test_tensors_on_two_devices(monkeypatch: pytest.MonkeyPatch, elsewhere: str) -> None:
    monkeypatch.setattr(few_operands, "DEVICES", ["cpu"])
    given = {"y": torch.zeros(1, 8, 4, 4), "weight": torch.zeros(8, 3, 3, 3), "d": torch.zeros(1, 3, 4, 4)}
    given = {name: t.to(memory_format=LAST) for name, t in given.items()}
    asked = {**given, elsewhere: given[elsewhere].to("meta")}
    says = "an NVIDIA GPU, got tensors on meta" if elsewhere == "weight" else "one NVIDIA GPU, got tensors on .*meta"
    y, d, shape = Lazy(asked["y"]), Lazy(asked["d"]), (1, 3, 4, 4)
    with pytest.raises(ValueError, match=says):
        few_channels.forward(y, asked["weight"], TIED, shape, d=d)
    assert few_channels.fused().forward(y, asked["weight"], TIED, shape, d=d, factor=None, window=None) is None


@pytest.mark.usefixtures("interpreted", "poisoned")
def test_a_table_that_names_what_is_not_there_costs_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a measurement, on a machine whose package was built without CUDA."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    architecture = chooser.device.current().architecture
    names = [f"cuda {chooser.shape_class(p, 'ieee', 9, (4, 3), 1)}" for p in ("forward", "source", "weight")]
    monkeypatch.setattr(chooser, "MEASURED", {architecture: frozenset(names)})
    monkeypatch.setattr(few_operands, "why_not_device", lambda kind, index=None: "not built")

    def launch(kernel: int, few: int, params: FewParams, like: Tensor) -> None:
        raise AssertionError("it was launched")

    monkeypatch.setattr(few_operands, "launch", launch)
    check_layer("conv", "triton", memory_format=LAST)
