"""What every test module shares: tests marked `gpu` skip where there is no CUDA device, Triton interprets there."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections import Counter

import numpy
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, by whomever


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--part", metavar="I/N", help="every N-th test marked gpu, from I = 0 on: to run them side by side"
    )
    parser.addoption(
        "--every", type=int, default=1, metavar="N", help="of every test its first case and each N-th after"
    )


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--every") > 1:
        met: Counter[tuple[object, str]] = Counter()
        parts: tuple[list[pytest.Item], list[pytest.Item]] = [], []
        for item in items:
            parts[met[case_of(item)] % config.getoption("--every") != 0].append(item)
            met[case_of(item)] += 1
        items[:], left_out = parts
        config.hook.pytest_deselected(items=left_out)
    traced = set()
    for item in items:
        if "interpreted" in getattr(item, "fixturenames", ()):
            # coverage doubles the time of Triton's interpreter: it traces the first case of every test alone
            if case_of(item) in traced:
                item.add_marker(pytest.mark.no_cover)
            traced.add(case_of(item))
        if torch.cuda.is_available() and "interpreted" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)  # there the kernels are compiled, and really tested
        elif not torch.cuda.is_available() and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if config.getoption("--part"):
        index, parts = map(int, config.getoption("--part").split("/"))
        items[:] = [item for item in items if item.get_closest_marker("gpu")][index::parts]


def case_of(item: pytest.Item) -> tuple[object, str]:
    """Which test this is a case of."""
    return item.path, getattr(item, "originalname", None) or item.name


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Settings, folder and results of a tiny demo that ran in one go, in this process."""
    from toys import tiny

    from racecar.demo.experiment import run_demo

    folder = tmp_path_factory.mktemp("demo")
    settings = tiny(folder)
    return settings, folder / "out", run_demo(settings, folder / "out", command="racecar demo")


@pytest.fixture
def interpreted(monkeypatch):
    """Triton kernels serve CPU tensors where there is no GPU. bfloat16 is rounded as GPUs do."""
    if torch.cuda.is_available():
        return
    import triton
    from triton.runtime import interpreter

    if triton.__version__ < "3.7" and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
        pytest.skip("the interpreter of Triton 3.6 needs numpy < 2.4")
    from racecar_kernels.gpu import device

    def convert(numbers, source, target, *rest):
        if (str(source), str(target)) != ("fp32", "bf16"):
            return convert_otherwise(numbers, source, target, *rest)
        return torch.from_numpy(numpy.ascontiguousarray(numbers)).bfloat16().view(torch.uint16).numpy()

    convert_otherwise = interpreter._convert_float
    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(device, "INTERPRETED", True)


@pytest.fixture(autouse=True)
def _no_tapes():
    """A test records for itself: what it replaces would not be seen in another one's tape."""
    from racecar_kernels import tape

    tape.forget()


@pytest.fixture
def unrecorded(monkeypatch):
    """Every call goes through Python, where a test counts what it calls."""
    from racecar_kernels import tape

    monkeypatch.setattr(tape, "enabled", False)


@pytest.fixture
def precision_of():
    """`precision_of("matrices", "tf32")`: how PyTorch multiplies float32 on a GPU, or "convolutions"; until the end."""
    flags = {"matrices": torch.backends.cuda.matmul, "convolutions": torch.backends.cudnn.conv}
    before = {of: flag.fp32_precision for of, flag in flags.items()}

    def set_to(of, precision):
        flags[of].fp32_precision = precision

    yield set_to
    for of, precision in before.items():
        set_to(of, precision)


@pytest.fixture
def poisoned():
    """Every uninitialised buffer is full of NaN, so that an element which is never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def replaced(monkeypatch):
    """`replaced(f)`: the backend of the C++ kernels takes f for the function of its family that is called so."""

    def replace(function):
        module = sys.modules["racecar_kernels.backends"]
        row = module.by_name("cpp")
        kernels = row.kernels()._replace(**{function.__name__: function})
        changed = dataclasses.replace(row, kernels=lambda: kernels)
        monkeypatch.setattr(module, "TABLE", tuple(changed if r.name == "cpp" else r for r in module.TABLE))

    return replace
