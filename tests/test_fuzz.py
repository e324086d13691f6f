"""A sample of the fuzz tests, the same one each time; `make fuzz` runs many more. And that they can fail."""

from __future__ import annotations

import dataclasses

import fuzz
import fuzz_chains
import fuzz_layers
import fuzz_pointwise
import pytest
import torch
from cases import BACKENDS
from fuzz_judge import check_close
from fuzz_tensors import STRIDES, Snapshot, Source

from racecar_kernels import extension, pointwise, undo

# Cases that went wrong once.
FOUND = {
    "scale in strides": dict(values="normal", dtype="bfloat16", latent=("tanhshrink", "group"), strides=("sliced",)),
    "PReLU at 0": dict(values="lattice", dtype="float32", latent=("prelu",), strides=("permuted",)),
    "PReLU of NaN": dict(values="nan", dtype="float64", latent=("prelu, one",), strides=("contiguous",)),
    "batch norm, ones between": dict(
        values="normal", dtype="float32", latent=("mish", "batch, plain"), strides=("contiguous", "overlapping"),
        norm="running", size=(1, 5, 4), batch=1,
    ),
    "weight in odd strides": dict(
        seed=0, batch=1, size=(1, 2, 1), channels=(2, 1), kernel=(1, 2, 1), bias=False, latent=("relu",),
        dtype="float32", strides=("permuted",), loss=False,
    ),
    "a channel norm of a vector": dict(dims=0, lead=0, latent=("batch, eval",), fitted=False),
    "groups that do not divide": dict(groups=2, fault="one output channel more than groups take"),
}  # fmt: skip
PLAIN = fuzz_layers.LayerCase(
    seed=4288, dims=2, lead=1, batch=5, size=(12, 3, 2), channels=(3, 2), groups=1, kernel=(1, 1, 1), stride=(1, 1, 1),
    padding=0, dilation=1, mode="zeros", bias=True, pre=(), latent=(), undo=(), norm="batch", reduction="sum",
    memory="store", backend=None, dtype="float64", values="normal", strides=("contiguous",), needs=63,
    incoming="sliced", loss=True, shared=False, fitted=True, fault="none",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("target", "number"), [("layers", 160), ("chains", 80), ("pointwise", 100)])
def test_a_sample(target: str, number: int, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(fuzz, "KEPT", tmp_path)  # the same cases whatever failed before
    outcomes = fuzz.run(target, number, seed=1)
    assert outcomes.total() >= number
    assert outcomes["served"] > 0.6 * number, outcomes  # else it tests nothing
    if target != "pointwise" or extension.load() is not None:  # plain PyTorch takes every tensor
        assert outcomes["refused"] > 0, outcomes


@pytest.mark.parametrize("changes", FOUND.values(), ids=FOUND)
def test_what_was_found(changes: dict) -> None:
    refused = "fault" in changes or not changes.get("fitted", True)
    assert fuzz_layers.check(dataclasses.replace(PLAIN, **changes)) == ("refused" if refused else "served")


def test_a_chain_that_compares_some_layers_locally_in_channels_last() -> None:
    """What is kept of a layer that is not compared is empty, and has no four dimensions."""
    first, second = (
        fuzz_chains.LayerOf(3, (3, 3, 3), 1, 1, 1, "zeros", True, (), (act,), compare)
        for act, compare in (("threshold", False), ("sigmoid", True))
    )
    case = fuzz_chains.ChainCase(
        seed=1865, dims=2, lead=0, batch=2, size=(6, 3, 1), channels=3, layers=(first, second), input_activation="",
        op="tied_chain", variant="local", memory="store", backend=None, dtype="float32", values="normal",
        strides=("channels_last",), needs=63, incoming="dense", loss=True, shared=False, fault="none",
    )  # fmt: skip
    assert fuzz_chains.check(case) == "served"
    alone = dataclasses.replace(case, layers=(first,))
    assert fuzz_chains.check(alone) == "refused"  # nothing is compared


def test_a_wrong_gradient_is_found(monkeypatch) -> None:
    """By a digit in the eighth place of one gradient."""
    backends = fuzz_layers.rk.backends.__globals__
    first = next(row for row in backends["TABLE"] if row.name == BACKENDS[0])
    right = first.backward

    def wrong(*args):
        grads = right(*args)
        if grads.y is not None:
            grads.y = grads.y * (1 + 1e-8)
        return grads

    monkeypatch.setitem(backends, "TABLE", (dataclasses.replace(first, backward=wrong),))
    with pytest.raises(AssertionError, match="gradients: off by"):
        fuzz_layers.check(PLAIN)


def test_a_failure_says_how_to_repeat_it(monkeypatch, tmp_path) -> None:
    right = undo.sum_of_squares
    monkeypatch.setattr(fuzz, "KEPT", tmp_path)
    monkeypatch.setattr(undo, "sum_of_squares", lambda target, *_: target.new_zeros(()))
    for cases in (60, 1):  # the second time it is what was kept that fails
        with pytest.raises(AssertionError, match=r"(?s)loss: off.*from fuzz_layers import \*\nprint\(check\(LayerCase"):
            fuzz.run("layers", cases, seed=cases)
        assert len(fuzz.kept("layers")) == 1
    monkeypatch.setattr(undo, "sum_of_squares", right)
    assert fuzz.run("layers", 1, seed=1).total() == 1 and not fuzz.kept("layers")


def test_an_argument_that_is_written_to_is_found() -> None:
    t = Source(0, torch.float32, ("sliced",)).tensor((3, 4), leaf=False)
    snapshot = Snapshot([t])
    snapshot.check()
    t.untyped_storage()[0] = 7  # in the gap in front of it
    with pytest.raises(AssertionError, match="an argument was written to"):
        snapshot.check()


def test_the_plain_twin_refuses_what_the_cpp_refuses() -> None:
    with pytest.raises((ValueError, RuntimeError)):
        pointwise.sum_of_squares_ref(pointwise.Lazy(torch.ones(2, 1)), pointwise.Lazy(torch.ones(2, 2)))


@pytest.mark.parametrize("kind", STRIDES)
def test_strides_change_no_value(kind: str) -> None:
    source = Source(3, torch.float64, (kind,))
    shape = (2, 1, 3, 4)
    t = source.tensor(shape, leaf=False)
    assert t.shape == shape and t.isfinite().all()
    if kind not in ("expanded", "overlapping"):
        torch.testing.assert_close(t, Source(3, torch.float64, ("contiguous",)).tensor(shape, leaf=False))


def test_what_is_as_exact_as_its_type_passes_and_what_is_not_does_not() -> None:
    x = [torch.tensor([1.0, -3.0, 1e-3], dtype=torch.float64)]

    def truth(inputs, *, plain=False):
        return {"sum": [(inputs[0].abs() if plain else inputs[0]).sum()]}

    for dtype in (torch.float32, torch.bfloat16):
        eps = torch.finfo(dtype).eps
        check_close({"sum": [x[0].to(dtype).sum()]}, truth, x, dtype, exact=False)
        with pytest.raises(AssertionError, match="sum: off by"):
            check_close({"sum": [x[0].sum() * (1 + 300 * eps)]}, truth, x, dtype, exact=False)


WIDE = fuzz_chains.ChainCase(
    seed=1, dims=2, lead=0, batch=2, size=(7, 6, 1), channels=1,
    layers=(fuzz_chains.LayerOf(16, (3, 3, 3), 1, 1, 1, "zeros", True, (), ("relu",), True),
            fuzz_chains.LayerOf(2, (3, 3, 3), 1, 1, 1, "zeros", True, ("max 2",), (), True)),
    input_activation="", op="tied_chain", variant="local", memory="store", backend=None, dtype="float64",
    values="normal", strides=("channels_last",), needs=62, incoming="dense", loss=True, shared=False, fault="none",
)  # fmt: skip
OF_WEIGHT = fuzz_pointwise.PointwiseCase(
    seed=1, function="grad_weight", level=fuzz_pointwise.LEVELS[0], shape=(2, 16, 6, 5), window=(2, 2), act_d="relu",
    act_a="identity", affine="none", terms=(True, True, False), in_place=False, pooled=False, done=False, mean=False,
    extra=True, layout="channels_last", dtype="float32", values="normal", strides=("contiguous",), fault="none",
    conv=(2, 3, 2, 2, 1, 1, 2, 1, 0),
)  # fmt: skip


@pytest.mark.skipif(extension.load() is None, reason="the extension is not built")
def test_a_wrong_gradient_of_the_first_layers_weight_is_found(replaced, monkeypatch) -> None:
    right = pointwise.grad_weight

    def grad_weight(*given, **options):
        found = right(*given, **options)
        return found and (found[0] * (1 + 1e-4), found[1])

    assert fuzz_chains.check(WIDE) == fuzz_pointwise.check(OF_WEIGHT) == "served"
    monkeypatch.setattr(pointwise, "grad_weight", grad_weight)
    replaced(grad_weight)
    with pytest.raises(AssertionError, match="gradients: off by"):
        fuzz_chains.check(WIDE)
    with pytest.raises(AssertionError, match="0: off by"):
        fuzz_pointwise.check(OF_WEIGHT)


@pytest.mark.parametrize("cases", ["0", "-3"])
def test_no_cases_are_refused_in_one_sentence(cases, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["fuzz.py", "--cases", cases])
    with pytest.raises(SystemExit) as ended:
        fuzz.main()
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == ""
    assert said.err.splitlines()[-1].endswith(f"error: --cases is a whole number from 1, got {cases}")
