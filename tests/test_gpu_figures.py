"""What `make gpu` measures of kernels: layers pass by pass, pointwise kernels; and that wrong ones get no figure."""

from __future__ import annotations

import pytest
import torch

from racecar.bench.networks import NETWORKS

pytest.importorskip("triton", reason="Triton is not installed")
from bench import bandwidth, device_time, layers, linear_layers
from bench.layer_shapes import Shape, shapes_in
from racecar_kernels.gpu import chooser, pointwise, transposed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreting = pytest.mark.usefixtures("interpreted")
SMALL = Shape(1, 2, 3, (4, 4), (3, 3), (1, 1), (1, 1), 1, (2, 2), None, "relu")
KEYS = {"architecture", "dtype", "pass", "kernel", "stride", "factor", "c_in", "c_out", "groups", "pixels",
        "library_us", "fused_us", "bytes", "flops"}  # fmt: skip


def test_every_shape_of_the_networks_stands_once():
    mnist = shapes_in(NETWORKS["mnist"], 1024)
    assert [(s.c_in, s.c_out, s.size, s.factor, s.window, s.epilogue) for s in mnist] == [
        (1, 64, (28, 28), (2, 2), None, "identity"),
        (1, 64, (28, 28), None, None, "identity"),
        (64, 64, (14, 14), (2, 2), (2, 2), "relu"),
        (64, 64, (14, 14), None, (2, 2), "relu"),
        (64, 1, (7, 7), None, (2, 2), "relu"),
    ]
    first = next(iter(mnist))
    assert first.source_size == (14, 14) and first.key["pixels"] == 1024 * 28 * 28
    assert first.flops == 2 * 1024 * 14 * 14 * 64 * 16  # 4x4 taps of the folded weight on small pixels
    vgg = shapes_in(NETWORKS["vgg19"], 64)
    assert any({6, 7} <= set(numbers) for numbers in vgg.values())
    assert sum(len(numbers) for numbers in vgg.values()) == 16 + 4  # those under a pooling: full, and local
    assert {s.epilogue for s in shapes_in(NETWORKS["cifar"], 2)} == {"identity", "none"}
    assert [s.epilogue for s in shapes_in(NETWORKS["smoke"], 2)] == ["identity", "none", "none", "relu"]


def test_networks_that_are_no_chains_are_refused():
    with pytest.raises(ValueError, match="the layers of a chain are measured; ResNet110"):
        shapes_in(NETWORKS["resnet110"], 1)


@interpreting
@pytest.mark.parametrize(
    "change", [{}, {"window": (2, 2), "factor": None}, {"epilogue": "none"}, {"epilogue": "identity"}]
)
def test_rows_of_a_layer(change):
    rows = list(layers.rows_of(SMALL._replace(**change), "float32", DEVICE, rounds=1))
    assert [row["pass"] for row in rows] == ["forward", "source", "weight"]
    for row in rows:
        assert row.keys() >= KEYS and "why" not in row
        assert row["library_us"] > 0 and row["fused_us"] > 0 and row["off"] < layers.ALLOWED[row["multiplied"]]
        assert row["bytes"] > 0 and row["flops"] == SMALL._replace(**change).flops
    assert DEVICE == "cuda" or rows[0]["architecture"] == "interpreter"


@interpreting
def test_what_the_fused_kernels_do_not_serve_has_the_library_alone():
    rows = list(
        layers.rows_of(SMALL._replace(stride=(5, 5), kernel=(5, 5), factor=None, size=(10, 10)), "float32", DEVICE, 1)
    )
    assert all(row["library_us"] > 0 and row["fused_us"] is None for row in rows)
    assert all("strides up to 4 are served" in row["why"] and "wrong" not in row for row in rows)


@interpreting
def test_a_wrong_fused_kernel_gets_no_figure(monkeypatch):
    right = transposed.forward
    monkeypatch.setattr(transposed, "forward", lambda y, *a, **k: right(y._replace(x=y.x * 1.01), *a, **k))
    rows = list(layers.rows_of(SMALL, "float32", DEVICE, rounds=1))
    assert (
        rows[0]["wrong"]
        and rows[0]["library_us"] is None
        and "off from the library's results: fused u by" in rows[0]["why"]
    )
    assert "wrong" not in rows[1]


@interpreting
def test_one_broken_layer_does_not_cost_the_others(monkeypatch):
    right = layers.rows_of

    def rows_of(shape, *rest):
        if shape.c_out == 1:
            raise RuntimeError("out of resources\nand more")
        return right(shape, *rest)

    found: list[int] = []
    monkeypatch.setattr(layers, "CHAINS", ("mnist",))
    monkeypatch.setattr(layers, "rows_of", rows_of)
    monkeypatch.setattr(layers, "timed", lambda row, *rest: row)
    rows = layers.measure(
        ["mnist"], "float32", DEVICE, rounds=1, tiny=True, finished=lambda f: found.append(len(f["rows"]))
    )["rows"]
    assert found == [3, 6, 9, 12, 13] and rows[-1]["why"] == "RuntimeError: out of resources" and rows[-1]["wrong"]
    assert rows[0]["layers"] == ["mnist 1"]


@interpreting
def test_rows_of_linear_layers(monkeypatch):
    rows = linear_layers.measure("float32", DEVICE, rounds=1, tiny=True)["rows"]
    assert [row["pass"] for row in rows] == ["output", "tied", "forward", "source", "weight", "both", "input"] * 2
    assert {pass_ for own in chooser.CHAIN_PASSES.values() for pass_ in own} <= {row["pass"] for row in rows}
    assert all(row.keys() >= KEYS and row["fused_us"] > 0 and row["library_us"] > 0 for row in rows), rows
    assert rows[0]["kernel"] == [] and rows[0]["pixels"] == 6
    assert [row["flops"] / (2 * 6 * 12 * 10) for row in rows[:7]] == [1, 2, 1, 1, 1, 2, 1]
    monkeypatch.setattr(linear_layers, "forms", lambda *_: {}["broken"])
    rows = linear_layers.measure("float32", DEVICE, rounds=1, tiny=True)["rows"]
    assert [row["why"] for row in rows] == ["KeyError: 'broken'"] * 2 and rows[0]["wrong"]


@interpreting
def test_every_pointwise_kernel_has_a_row():
    rows = bandwidth.measure("float32", DEVICE, rounds=1, tiny=True)["rows"]
    assert not [row for row in rows if row.get("wrong")]
    assert {row["kernel"].split(" ")[0] for row in rows} >= {
        "channel_sum", "batch_norm", "norm_input_grad_", "materialise", "sum_of_squares", "compare", "grad_reverse",
        "grad_forward",
    }  # fmt: skip
    one = next(row for row in rows if row["kernel"] == "compare 2x2")
    assert one["bytes"] == 1.5 * 2 * 8 * 6 * 6 * 4 and one["share"] > 0


@interpreting
def test_a_wrong_pointwise_kernel_gets_no_figure(monkeypatch):
    monkeypatch.setattr(pointwise, "channel_sum", lambda g: g.sum((0, 2, 3)) * 1.01)
    row = bandwidth.measure("float32", DEVICE, rounds=1, tiny=True)["rows"][0]
    assert row["wrong"] and "us" not in row and "off from plain PyTorch by 1.0e-02" in row["why"]


def test_errors_are_relative_and_see_what_is_not_finite():
    a = torch.tensor([3.0, 4.0])
    assert device_time.relative_error(a * 1.01, a) == pytest.approx(0.01, rel=1e-4)
    assert device_time.relative_error(torch.tensor([3.0, float("nan")]), a) == float("inf")
    assert device_time.relative_error(a[:1], a) == float("inf")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_layers_need_a_gpu_or_a_dry_run(tmp_path, capsys):
    assert layers.main(["--out", str(tmp_path / "x.json")]) == 2
    assert "sees no CUDA device; --dry-run" in capsys.readouterr().err
