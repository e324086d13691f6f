"""The backend `cuda`: few channels in CUDA kernels (without a GPU in their source on the CPU), the rest in Triton's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import cuda_chain
import pytest
import torch
from cuda_host import Folding, launch_few_channels
from test_triton_backend import POLICIES, check_layer, check_network, gradients, network
from torch import Tensor

import racecar
import racecar_kernels as rk
from bench import gpu_summary, layers
from bench.layer_shapes import Shape
from racecar_kernels import extension, tape
from racecar_kernels.cuda import few_channels, few_operands, linear_chain
from racecar_kernels.gpu import chooser
from racecar_kernels.layer import Layer, Tied

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.usefixtures("interpreted", "poisoned", "without_tf32")
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
LAST = torch.channels_last
LAYERS = ["conv", "strided, odd", "batch norm, relu", "pooled, cut", "source pooled", "up-sampled", "same, even kernel",
          "source pooled, many pixels, few channels", "stride beyond kernel", "one pixel, one channel"]  # fmt: skip
CHANNELS = [(1, 8, 6), (3, 8, 6)]
ONCE = {few_operands.NARROW: 1, few_operands.WIDE: 1, few_operands.WEIGHT: 1}


@pytest.fixture
def without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each CUDA kernel was launched since; without a GPU its source runs on the CPU."""
    if ON_GPU and (reason := extension.why_not(extension.CUDA)):
        pytest.skip(reason)
    counted: Counter[int] = Counter()
    right = few_operands.launch if ON_GPU else launch_few_channels

    def launch(kernel: int, few: int, params: Any, like: Tensor) -> None:
        counted[kernel] += 1
        right(kernel, few, params, like)

    monkeypatch.setattr(few_operands, "launch", launch)
    if not ON_GPU:
        monkeypatch.setattr(few_operands, "DEVICES", ["cpu"])
        monkeypatch.setattr(few_operands, "folding", lambda like: Folding())
    return counted


@pytest.mark.parametrize("name", LAYERS)
def test_a_reverse_layer_against_float64(name: str, launched: Counter[int]) -> None:
    check_layer(name, "cuda", memory_format=LAST)
    assert launched == {kernel: 7 * times for kernel, times in ONCE.items()}


@pytest.mark.parametrize("channels", CHANNELS, ids=str)
@pytest.mark.parametrize(("variant", "memory"), POLICIES)
def test_a_network_against_float64(
    variant: str, memory: str, channels: tuple[int, int, int], launched: Counter[int]
) -> None:
    check_network("cuda", channels, variant=variant, memory=memory)
    again = 7 if memory == "recompute" else 0  # the reverse pass runs once more, for its gradients
    assert launched == {few_operands.NARROW: 7 + again, few_operands.WIDE: 7, few_operands.WEIGHT: 7}


@pytest.mark.skipif(extension.load() is None, reason="tapes are replayed by the compiled extension")
@pytest.mark.parametrize(("variant", "memory"), POLICIES)
def test_steps_are_replayed_bit_by_bit(variant: str, memory: str, launched: Counter[int]) -> None:
    """The first by Python, the second recorded, the third replayed: a kernel is one instruction of each."""
    net = racecar.wrap(network(0, (3, 8, 6)).to(DEVICE), 0.1, backend="cuda", variant=variant, memory=memory)
    x = torch.randn(2, 3, 4, 5, device=DEVICE).to(memory_format=LAST)
    found, counts = [], []
    for _ in range(3):
        net.zero_grad()
        (net(x).square().sum() + net.reverse_loss).backward()
        found.append([p.grad.clone() for p in net.parameters()])
        counts.append(dict(launched))
        launched.clear()
    assert all(torch.equal(a, b) for again in found[1:] for a, b in zip(found[0], again, strict=True))
    assert counts[0] == counts[1] == counts[2] and counts[0][few_operands.WEIGHT] == 1
    refused = [why for tapes in tape._TAPES.values() for why in tapes.seen.values() if why is not None]
    assert refused == [] and sum(len(tapes.known) for tapes in tape._TAPES.values()) == 2


def test_other_layers_go_where_triton_sends_them(launched: Counter[int]) -> None:
    """Many channels on both sides, and groups."""
    wide, weight = Tied((1, 1), ((1, 1), (1, 1)), (1, 1)), torch.randn(8, 6, 3, 3, device=DEVICE)
    takes = few_channels.fused().takes
    assert not takes("forward", weight, wide, None)
    assert not takes("forward", weight[:, :2], Tied((1, 1), ((1, 1), (1, 1)), (1, 1), 2), None)
    assert takes("forward", weight[:, :3], wide, None)
    plan = str(racecar.wrap(network(0, (3, 8, 6)).to(DEVICE), 0.1, backend="cuda").plan)
    assert plan.count("cuda, cuda forward, source, weight") == 1 and plan.count("cuda, library") == 1


def test_a_contiguous_layer_is_the_librarys(launched: Counter[int]) -> None:
    check_layer("conv", "cuda")
    assert not launched


def test_the_table_sends_the_default_backend_there(monkeypatch: pytest.MonkeyPatch, launched: Counter[int]) -> None:
    """A pass that was measured to be fastest in CUDA, another one in Triton, the third in neither."""
    architecture = chooser.device.of(torch.empty(0, device=DEVICE)).architecture
    names = {pass_: chooser.shape_class(pass_, "ieee", 9, (8, 3), 1) for pass_ in ("forward", "source", "weight")}
    chosen = frozenset([f"cuda {names['source']}", names["weight"]])
    monkeypatch.setattr(chooser, "MEASURED", {architecture: chosen})
    gradients("triton", torch.float32, 0, (3, 8, 6), variant="full", memory="store")
    assert launched == {few_operands.WIDE: 1}
    plan = str(racecar.wrap(network(0, (3, 8, 6)).to(DEVICE), 0.1, backend="triton").plan)
    assert "triton, cuda source; fused weight" in plan


def full(*args: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_no_memory_for_a_workspace_is_the_librarys_way(monkeypatch: pytest.MonkeyPatch, launched: Counter[int]) -> None:
    """Sums of blocks that do not fit: the layer is computed all the same."""
    monkeypatch.setattr(few_operands, "launch", full)
    check_layer("conv", "cuda", memory_format=LAST)
    weight = torch.randn(8, 3, 3, 3, device=DEVICE)
    y = torch.randn(1, 8, 4, 4, device=DEVICE).to(memory_format=LAST)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):  # asked for by itself
        few_channels.forward(chooser.Lazy(y), weight, Tied((1, 1), ((1, 1), (1, 1)), (1, 1)), (1, 3, 4, 4))


@pytest.mark.skipif(extension.load() is None, reason="tapes are replayed by the compiled extension")
@pytest.mark.parametrize(("variant", "memory"), POLICIES)
def test_no_memory_in_a_replay(
    variant: str, memory: str, monkeypatch: pytest.MonkeyPatch, launched: Counter[int]
) -> None:
    """Bit by bit what Python gives where memory ends; and with room again, the kernels once more."""
    net = racecar.wrap(network(0, (3, 8, 6)).to(DEVICE), 0.1, backend="cuda", variant=variant, memory=memory)
    x = torch.randn(2, 3, 4, 5, device=DEVICE).to(memory_format=LAST)

    def step() -> list[Tensor]:
        net.zero_grad()
        (net(x).square().sum() + net.reverse_loss).backward()
        return [p.grad.clone() for p in net.parameters()]

    *_, served = [step() for _ in range(3)]
    with monkeypatch.context() as patch:
        patch.setattr(few_operands, "launch", full)
        replayed = step()
        patch.setattr(tape, "enabled", False)
        by_python = step()
    assert all(map(torch.equal, replayed, by_python))
    assert all(map(torch.equal, step(), served))


@pytest.fixture
def chained(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often the kernels for chains were launched since; without a GPU, their source on the CPU."""
    counted: Counter[str] = Counter()
    if not ON_GPU:
        host = cuda_chain.Host()
        monkeypatch.setattr(linear_chain, "DEVICES", ["cpu"])
        monkeypatch.setattr(linear_chain, "_module", lambda: host)

    def counting(name: str) -> None:
        right = getattr(linear_chain, name)

        def launch(*args: Any) -> Any:
            counted[name] += 1
            return right(*args)

        monkeypatch.setattr(linear_chain, name, launch)

    counting("forward")
    counting("backward")
    linear_chain._compiled.cache_clear()
    yield counted
    linear_chain._compiled.cache_clear()


@pytest.mark.parametrize("broken", [None, "few channels", "narrow chain"])
def test_the_doctor_checks_its_kernels(
    broken: str | None, monkeypatch: pytest.MonkeyPatch, launched: Counter[int], chained: Counter[str]
) -> None:
    doctor = pytest.importorskip("racecar.doctor", reason="rich is not installed")
    monkeypatch.setattr(doctor.rk, "backends", lambda on_request: ("cuda",))
    if broken is not None:
        module, name = (few_channels, "weight_gradient") if broken == "few channels" else (linear_chain, "backward")
        right = getattr(module, name)

        def off(*args: Any, **kwargs: Any) -> Any:
            found = right(*args, **kwargs)
            (found[1] if isinstance(found, list) else found).mul_(1 + 1e-4)
            return found

        monkeypatch.setattr(module, name, off)
    outcomes = {check.backend: check.outcome for check in doctor.checks() if check.backend.startswith("cuda")}
    assert outcomes == {
        f"cuda: {part}": "wrong" if part == broken else "right" for part in ("few channels", "narrow chain")
    }
    assert launched.keys() == ONCE.keys() and chained.keys() == {"forward", "backward"}


SMALL = Shape(1, 3, 8, (4, 6), (3, 3), (1, 1), (1, 1), 1, None, (2, 2), "relu")


@pytest.mark.parametrize(
    "change", [{}, {"window": None}, {"factor": (2, 2), "window": None, "epilogue": "none"}], ids=str
)
def test_it_is_measured_beside_the_others(change: dict[str, Any], launched: Counter[int]) -> None:
    rows = list(layers.rows_of(SMALL._replace(**change), "float32", DEVICE, rounds=1))
    folding = [rows.pop()] if "factor" in change else []
    assert all(row["pass"] == "fold" and row["cuda_us"] > 0 and row["library_us"] > 0 for row in folding)
    assert [row["pass"] for row in rows] == ["forward", "source", "weight"] and launched.keys() == ONCE.keys()
    assert all(row["cuda_us"] > 0 and row["fused_us"] > 0 and not {"why", "cuda_why"} & row.keys() for row in rows)
    assert rows[2]["cuda_given_us"] > 0
    (wide, *_) = layers.rows_of(SMALL._replace(c_in=5), "float32", DEVICE, rounds=1)
    assert wide["cuda_us"] is None and wide["fused_us"] > 0 and "cuda_why" not in wide


def test_a_wrong_one_gets_no_figure(monkeypatch: pytest.MonkeyPatch, launched: Counter[int]) -> None:
    right = few_channels.source_gradient

    def wrong(*args: Any, **kwargs: Any) -> Any:
        source, bias = right(*args, **kwargs)
        return source * 1.02, bias

    monkeypatch.setattr(few_channels, "source_gradient", wrong)
    rows = list(layers.rows_of(SMALL, "float32", DEVICE, rounds=1))
    assert [row.get("wrong", False) for row in rows] == [False, True, False]
    assert rows[1]["cuda_us"] is None and "off from the library's results: cuda s by" in rows[1]["why"]


def test_a_wrong_fold_gets_no_figure(monkeypatch: pytest.MonkeyPatch, launched: Counter[int]) -> None:
    class Wrong(Folding):
        def fold_adjoint(self, grad: Tensor, factor: Any, dtype: torch.dtype) -> Tensor:
            return super().fold_adjoint(grad, factor, dtype) * 1.02

    monkeypatch.setattr(few_operands, "folding", lambda like: Wrong())
    *_, row = layers.rows_of(SMALL._replace(factor=(2, 2), window=None, epilogue="none"), "float32", DEVICE, rounds=1)
    assert row["pass"] == "fold" and row["cuda_us"] is None and "cuda unfolded by" in row["why"]


def test_what_is_not_served_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_operands, "DEVICES", [])
    row = next(layers.rows_of(SMALL, "float32", DEVICE, rounds=1))
    assert row["cuda_us"] is None and row["fused_us"] > 0 and "need an NVIDIA GPU" in row["cuda_why"]
    table = gpu_summary._layer_table({"rows": [{**row, "layers": ["mnist 1"]}]}).splitlines()
    assert "cuda µs" in table[0] and "need an NVIDIA GPU" in table[-1]


ROW: dict[str, Any] = {
    "architecture": "sm_90", "dtype": "bfloat16", "pass": "forward", "kernel": [3, 3], "stride": [1, 1], "factor": None,
    "c_in": 3, "c_out": 64, "groups": 1, "library_us": 10.0, "fused_us": None, "cuda_us": None,
}  # fmt: skip


def test_the_table_names_the_form_that_won() -> None:
    found = chooser.faster([
        {**ROW, "cuda_us": 4.0},
        {**ROW, "pass": "source", "cuda_us": 4.0, "fused_us": 5.0},
        {**ROW, "pass": "source", "cuda_us": 9.0, "fused_us": 4.0},  # in the mean Triton's is the faster one
        {**ROW, "pass": "weight", "cuda_us": 4.0, "fused_us": 9.0},
        {**ROW, "pass": "weight", "cuda_us": 11.0, "fused_us": 9.0},  # CUDA's once loses to the library
        {**ROW, "c_out": 9, "cuda_us": 10.0, "fused_us": 12.0},
        {**ROW, "c_out": 20, "cuda_us": 1.0, "wrong": True},
        {**ROW, "pass": "fold", "factor": [2, 2], "cuda_us": 1.0},  # what no layer asks for by itself
    ])  # fmt: skip
    assert found == {
        "sm_90": {
            "cuda forward half 9 taps 64 to 4 channels stride 1",
            "source half 9 taps 64 to 4 channels stride 1",
            "weight half 9 taps 64 to 4 channels stride 1",
        }
    }


@pytest.mark.skipif(ON_GPU, reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    query = rk.Query(Layer(Tied()), "cpu", torch.float32)
    assert rk.why_not("cuda", query) == "the CUDA kernels need an NVIDIA GPU, got tensors on cpu"
    with pytest.raises(ValueError, match="backend 'cuda' cannot serve this layer: the CUDA kernels need an NVIDIA GPU"):
        racecar.wrap(network(), 0.1, backend="cuda")(torch.randn(1, 2, 4, 4))
    assert "float64" in (rk.why_not("cuda", query._replace(dtype=torch.float64)) or "")
