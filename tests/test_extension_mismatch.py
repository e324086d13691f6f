"""Real files in the extension's place that do not fit, each in a process of its own: refused in one sentence, once."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import racecar_kernels

PACKAGE = Path(racecar_kernels.__file__).parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the files are made for Linux"),
    pytest.mark.skipif(COMPILER is None, reason="there is no C compiler"),
]

MODULE = """
#include <Python.h>
static PyObject *build_facts(PyObject *self, PyObject *none) { @FACTS@ }
static PyMethodDef methods[] = {{@NAME@, build_facts, METH_NOARGS, ""}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "", -1, methods, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit__C(void) { @INIT@; return PyModule_Create(&module); }
"""
FACTS = 'return Py_BuildValue("{s:s}", "torch", @TORCH@);'

# What a user does: look, then work, twice. The chain and the sum have to be those of a process without the extension.
USE = """
import sys
import warnings
# an editable installation would lend its own extension to this copy of the package
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import torch
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    import racecar_kernels as rk
    from racecar_kernels import extension, pointwise
    print("at import:", len(told))
    print(rk.show_config())
    print("told by show_config:", len(told))
    for _ in range(2):
        x = torch.linspace(-1, 1, 12).view(4, 3).requires_grad_()
        w = torch.linspace(-1, 1, 6).view(2, 3).requires_grad_()
        out, losses = rk.tied_chain(x, [rk.Layer(rk.Tied())], [w], [None])
        (out.sum() + losses.sum()).backward()
        total = pointwise.channel_sum(x.detach())
    print("results:", losses.tolist(), x.grad.sum().item(), w.grad.sum().item(), total.tolist())
    print("loaded:", extension.load() is not None)
    for w in told:
        print("told:", w.category.__name__, w.message)
"""


def compiled(to: Path, *, torch_version: str = "2.0.1", facts: str = FACTS, init: str = "", name: str = "build_facts",
             before: str = "", flags: tuple[str, ...] = ()) -> None:  # fmt: skip
    """A module as small as can be, that says that it was built for `torch_version`."""
    source = MODULE.replace("@FACTS@", facts).replace("@INIT@", init).replace("@NAME@", f'"{name}"')
    code = to.parent / "module.c"
    code.write_text(before + source.replace("@TORCH@", f'"{torch_version}"'))
    include = sysconfig.get_path("include")
    subprocess.run([COMPILER, "-shared", "-fPIC", f"-I{include}", str(code), "-o", str(to), *flags], check=True)


def undefined_symbol(to: Path) -> None:
    compiled(to, before="void _ZN2at9long_goneEv(void);", init="_ZN2at9long_goneEv()")


def missing_library(to: Path) -> None:
    """Linked against an OpenMP that is not there any more."""
    library = to.parent / "libomp_gone.so"
    (to.parent / "omp.c").write_text("int omp_is_here(void) { return 1; }")
    subprocess.run([COMPILER, "-shared", "-fPIC", str(to.parent / "omp.c"), "-o", str(library)], check=True)
    compiled(to, before="int omp_is_here(void);", init="omp_is_here()", flags=(f"-L{to.parent}", "-lomp_gone"))
    library.unlink()


def cut_off(part: float) -> Callable[[Path], None]:
    def make(to: Path) -> None:
        compiled(to, torch_version=torch.__version__.split("+")[0])
        to.write_bytes(to.read_bytes()[: int(part * to.stat().st_size)])

    return make


def other_python(to: Path) -> None:
    compiled(to.with_name("_C.cpython-39-x86_64-linux-gnu.so"))


WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "undefined symbol": (undefined_symbol, "built for another PyTorch than .*undefined symbol: _ZN2at9long_goneEv"),
    "another PyTorch": (compiled, "it was built for PyTorch 2.0.1, but .* is running"),
    "no library": (missing_library, "it cannot be loaded: libomp_gone.so: cannot open shared object file"),
    "empty": (cut_off(0), r"is cut off: 0 bytes of at least 64"),
    "cut in the header": (cut_off(0.002), r"is cut off: \d\d bytes of at least 64"),
    "cut early": (cut_off(0.1), r"is cut off: \d+ bytes of at least \d+"),
    "cut in the middle": (cut_off(0.5), r"is cut off: \d+ bytes of at least \d+"),
    "cut late": (cut_off(0.99), r"is cut off: \d+ bytes of at least \d+"),
    "no library at all": (
        lambda to: to.write_text("a page of HTML\n" * 9),
        "it cannot be loaded: .*invalid ELF header",
    ),
    "of another Python": (other_python, r"this Python loads _C\..*, but there is _C.cpython-39-x86_64-linux-gnu.so"),
    "no facts": (lambda to: compiled(to, name="other"), "does not say which PyTorch it was built for .AttributeError"),
    "facts without torch": (lambda to: compiled(to, facts="return PyDict_New();"), "does not say .*KeyError"),
    "it raises": (
        lambda to: compiled(to, init='PyErr_SetString(PyExc_OSError, "no luck"); return NULL'),
        "its initialisation failed: OSError: no luck",
    ),
    "no module": (lambda to: compiled(to, before="#define PyInit__C PyInit_other\n"), "cannot be loaded: .*PyInit__C"),
}


def use(folder: Path, make: Callable[[Path], None] | None) -> str:
    """Output of USE with a copy of the package that has `make`'s file in the extension's place."""
    package = folder / "racecar_kernels"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    if make is not None:
        make(package / f"_C{SUFFIX}")
    done = subprocess.run(
        [sys.executable, "-c", USE], cwd=folder, env={"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout


def line(output: str, start: str) -> str:
    (found,) = [each for each in output.splitlines() if each.startswith(start)]
    return found


@pytest.fixture(scope="module")
def without(tmp_path_factory) -> str:
    return use(tmp_path_factory.mktemp("without"), None)


def test_one_that_was_never_built_is_no_reason_to_warn(without: str) -> None:
    assert line(without, "compiled extension:").startswith("compiled extension: not built; to build it, in the source")
    assert "told:" not in without and line(without, "loaded:") == "loaded: False"


@pytest.mark.slow
@pytest.mark.parametrize(("make", "says"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused_in_one_sentence(make, says: str, without: str, tmp_path: Path) -> None:
    output = use(tmp_path, make)
    assert line(output, "results:") == line(without, "results:")
    assert line(output, "loaded:") == "loaded: False"
    assert line(output, "at import:") == "at import: 0" and line(output, "told by show") == "told by show_config: 0"
    shown = line(output, "compiled extension:")
    assert re.search(says, shown), shown
    assert "To rebuild it, in the source folder: pip install --no-build-isolation" in shown
    told = line(output, "told:")  # at first use, once: neither at import nor at each call
    assert told.startswith("told: RuntimeWarning racecar_kernels: the compiled extension is not used: ")
    assert re.search(says, told) and "plain PyTorch does its work" in told
