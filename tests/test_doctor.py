"""`racecar doctor`: what it prints, and that it finds a backend that is wrong."""

from __future__ import annotations

import json
import re
import sys
import sysconfig
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

import racecar_kernels as rk
from racecar import doctor
from racecar.cli import app
from racecar_kernels import cuda_toolkit, extension, reference
from racecar_kernels.backends import TABLE
from racecar_kernels.layer import Layer, Tied

ON_GPU = rk.Query(Layer(Tied()), "cuda", torch.float32)


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "120", "TERM": "dumb", "NO_COLOR": "1"})


def test_it_names_versions_modules_and_every_backend() -> None:
    result = invoke()
    assert result.exit_code == 0, result.output
    said = result.stdout
    assert re.search(rf"^PyTorch +{re.escape(torch.__version__)}$", said, flags=re.MULTILINE)
    assert re.search(rf"^CUDA of PyTorch +{torch.version.cuda or 'none'}$", said, flags=re.MULTILINE)
    for name in (extension.CPP, extension.CUDA):
        assert f"racecar_kernels.{name}: {extension.why_not(name, warn=False) or doctor.use(name)}" in said
    for name in rk.backends(on_request=True):
        name = "cuda: narrow chain" if name == "cuda" and rk.why_not(name, ON_GPU) is None else name
        assert re.search(rf"│ {name} +│ (cpu|cuda) +│ (right|not here) +│", said), said


def test_json_holds_the_same() -> None:
    found = json.loads(invoke("--json").stdout)
    assert found["versions"]["racecar-kernels"] == rk.__version__ and found["wrong"] == []
    assert [module["module"] for module in found["modules"]] == ["_C", "_CUDA"]
    by_name = {check["backend"]: check for check in found["checks"]}
    of_cuda = {"cuda: few channels", "cuda: narrow chain"} if rk.why_not("cuda", ON_GPU) is None else {"cuda"}
    assert {*rk.backends(), "triton:fused", "triton:library", *of_cuda, "_CUDA: folding"} == by_name.keys()
    plain = by_name["reference"]
    assert plain["outcome"] == "right" and plain["milliseconds"] > 0 and plain["error"] <= 2 * plain["plain_error"]
    for check in found["checks"]:
        assert (check["error"] is None) == (check["outcome"] == "not here") == (check["why_not"] is not None)


def with_reference(monkeypatch, **functions) -> None:
    """Puts a changed reference backend in the place of all."""
    (own,) = [row for row in TABLE if row.name == "reference"]
    module = sys.modules[rk.backends.__module__]
    monkeypatch.setattr(module, "TABLE", (replace(own, **functions),))
    monkeypatch.setattr(module, "ON_REQUEST", ())


def off_by(factor: float, what: str):
    """The reference's backward with one of its gradients multiplied."""

    def backward(*args):
        grads = reference.backward(*args)
        setattr(grads, what, getattr(grads, what) * factor)
        return grads

    return backward


@pytest.mark.parametrize("what", ["y", "target", "weight", "bias"])
def test_a_wrong_gradient_is_found_and_ends_with_status_1(monkeypatch, what: str) -> None:
    with_reference(monkeypatch, backward=off_by(1 + 1e-4, what))
    result = invoke()
    assert result.exit_code == 1
    assert "error: wrong results: reference" in result.stderr
    assert re.search(r"^reference: it is off from float64 by \d.\de-0[4-6], plain PyTorch by \de?", result.stdout, re.M)


def test_no_number_is_wrong_too(monkeypatch) -> None:
    with_reference(monkeypatch, backward=off_by(float("nan"), "weight"))
    found = invoke("--json")
    assert found.exit_code == 1
    (check, _) = json.loads(found.stdout)["checks"]
    assert check["trouble"] == "ArithmeticError: not all of its results are finite numbers"


def test_what_raises_is_wrong(monkeypatch) -> None:
    def broken(*_):
        raise RuntimeError("the kernel\n was not launched")

    with_reference(monkeypatch, forward=broken)
    result = invoke()
    assert result.exit_code == 1
    assert "reference: RuntimeError: the kernel was not launched" in result.stdout


class Folding:
    """What `_CUDA` has for folding, in plain PyTorch: there is no GPU in most tests."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def fold(self, weight, factor):
        channels = weight.shape[0] * weight.shape[1]
        ones = weight.new_ones(channels, 1, *factor)
        folded = F.conv_transpose2d(weight.reshape(1, channels, *weight.shape[2:]), ones, groups=channels)
        return self.factor * folded.view(*weight.shape[:2], *folded.shape[2:])

    def fold_adjoint(self, grad, factor, dtype):
        return F.avg_pool2d(grad, factor, stride=1, divisor_override=1).to(dtype)


@pytest.mark.parametrize(("factor", "wrong"), [(1.0, []), (1.001, ["_CUDA: folding"])])
def test_the_cuda_kernels_are_checked_by_themselves(monkeypatch, factor: float, wrong: list[str]) -> None:
    monkeypatch.setattr(doctor.extension, "load", lambda name, warn: Folding(factor))
    monkeypatch.setattr(doctor.extension, "why_not", lambda name, warn: None)
    monkeypatch.setattr(doctor.rk, "backends", lambda on_request: ())
    found = list(doctor.checks())
    assert [check.backend for check in found if check.trouble] == wrong
    assert [check.outcome for check in found] == ["wrong" if wrong else "right"]


def test_it_does_not_say_in_use_before_anything_is_chosen(monkeypatch) -> None:
    assert doctor.use("_C") == "in use"
    assert doctor.use("_CUDA") == 'loaded; used where asked for (backend="cuda")'
    monkeypatch.setitem(doctor.measured.FASTER, "sm_90", ["weight half 9 taps 64 to 4 channels stride 1"])
    assert doctor.use("_CUDA").startswith("loaded")
    monkeypatch.setitem(doctor.measured.FASTER, "sm_90", ["cuda weight half 9 taps 64 to 4 channels stride 1"])
    assert doctor.use("_CUDA") == "in use"


def test_no_compiler_and_a_broken_one_are_told(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert doctor.versions()["nvcc"] is None

    def broken():
        raise cuda_toolkit.ToolkitError("nvcc does not run")

    monkeypatch.setattr(cuda_toolkit, "find", broken)
    monkeypatch.setattr(cuda_toolkit, "driver_version", lambda: (12, 4))
    told = doctor.versions()
    assert told["nvcc"] == "nvcc does not run" and told["NVIDIA driver"] == "for CUDA 12.4 and older"


def test_a_refused_module_is_told_without_a_warning(monkeypatch, tmp_path, recwarn) -> None:
    """The sentence stands in what is printed."""
    caches = (extension._found, extension._of_gpu, extension.warn_once)
    for cached in caches:
        cached.cache_clear()
    monkeypatch.setattr(extension, "FOLDER", tmp_path)
    for name in (extension.CPP, extension.CUDA):
        (tmp_path / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"\x7fELF")
    try:
        told = doctor.examine()["modules"]
    finally:
        for cached in caches:
            cached.cache_clear()
    assert all("is cut off: 4 bytes of at least 64" in module["why_not"] for module in told)
    assert not [w for w in recwarn.list if "racecar_kernels" in str(w.message)]
