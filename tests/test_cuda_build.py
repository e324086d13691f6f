"""Building `_CUDA`: the switch, the sentences, the compiler, and what is left of an earlier build."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

from racecar_kernels import cuda_toolkit

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the CUDA kernels are built on Linux")

NVCC = """#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
--list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_90\\ncompute_100\\n' ;;
--dryrun) echo '#$ TOP={home}/bin/..' >&2 ;;
esac
"""


MODULE = """#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_CUDA", "", -1, NULL, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit__CUDA(void) { return PyModule_Create(&module); }
"""


def toolkit(home: Path, version: str = "13.0") -> Path:
    """A folder like a toolkit's, with an nvcc that only answers questions."""
    for part in ("bin", "include", "lib64"):
        (home / part).mkdir(parents=True, exist_ok=True)
    (home / "include" / "cuda_runtime_api.h").touch()
    (home / "lib64" / "libcudart.so").touch()
    (home / "bin" / "nvcc").write_text(NVCC.format(version=version, home=home))
    (home / "bin" / "nvcc").chmod(0o755)
    return home


class Decided(NamedTuple):
    """What setup.py would build, what it said, and with what it stopped."""

    modules: list[setuptools.Extension]
    said: str
    commands: dict[str, type[setuptools.Command]]
    stopped: str | None = None


@pytest.fixture
def decide(monkeypatch, capsys):
    """Runs setup.py up to where it would build, with a PyTorch that says it is of this CUDA, in this environment."""

    def run(cuda: str | None, **environment: str) -> Decided:
        for name in os.environ:
            if name.startswith(("RACECAR", "CUDA", "TORCH_CUDA")):
                monkeypatch.delenv(name)
        for name, value in {
            "RACECAR_BUILD_CPP": "0",
            "MAX_JOBS": "1",
            "PATH": os.environ["PATH"],
            **environment,
        }.items():
            monkeypatch.setenv(name, value)
        modules: list[setuptools.Extension] = []
        commands: dict[str, type[setuptools.Command]] = {}

        def setup(ext_modules=(), cmdclass=(), **_):
            modules.extend(ext_modules)
            commands.update(cmdclass)

        monkeypatch.setattr(setuptools, "setup", setup)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
        monkeypatch.chdir(ROOT)
        capsys.readouterr()
        try:
            runpy.run_path("setup.py", run_name="__main__")
        except SystemExit as stop:
            return Decided(modules, capsys.readouterr().err, commands, str(stop))
        return Decided(modules, capsys.readouterr().err, commands)

    return run


WITHOUT = [
    ("0", None, {}, "RACECAR_BUILD_CUDA=0"),
    ("auto", None, {}, "this PyTorch, {torch}, is built without CUDA"),
    ("auto", "13.0", {"CUDA_HOME": "/no/such/place"}, "there is no nvcc: CUDA_HOME=/no/such/place has no bin/nvcc"),
    ("auto", "12.8", {"CUDA_HOME": "{home}"}, "nvcc is of CUDA 13.0, but PyTorch {torch} is built with CUDA 12.8"),
    ("auto", "13.0", {"CUDA_HOME": "{home}", "TORCH_CUDA_ARCH_LIST": "7.5"}, "nothing of TORCH_CUDA_ARCH_LIST='7.5'"),
    ("auto", "13.0", {"CUDA_HOME": "{home}", "TORCH_CUDA_ARCH_LIST": "Hopper"}, "TORCH_CUDA_ARCH_LIST holds 'Hopper'"),
]


@pytest.mark.parametrize(("switch", "cuda", "environment", "reason"), WITHOUT, ids=[row[3] for row in WITHOUT])
def test_one_line_says_why_it_is_not_built(decide, switch, cuda, environment, reason: str, tmp_path: Path) -> None:
    home = toolkit(tmp_path / "cuda")
    environment = {name: value.format(home=home) for name, value in environment.items()}
    reason = reason.format(torch=torch.__version__)
    done = decide(cuda, RACECAR_BUILD_CUDA=switch, **environment)
    assert not done.modules and done.stopped is None
    (said,) = [line for line in done.said.splitlines() if "_CUDA" in line]
    assert said.startswith(f"racecar-kernels: racecar_kernels._CUDA is not built: {reason}")
    assert said.endswith("pip install --no-build-isolation .")
    if switch == "auto":
        asked_for = decide(cuda, RACECAR_BUILD_CUDA="1", **environment)
        assert asked_for.stopped.startswith(f"racecar_kernels._CUDA is not built: {reason}")


def test_where_all_is_there_it_is_built_for_what_the_compiler_knows(decide, tmp_path: Path) -> None:
    home = toolkit(tmp_path / "cuda")
    done = decide("13.2", RACECAR_BUILD_CUDA="auto", CUDA_HOME=str(home))
    told = "racecar-kernels: racecar_kernels._CUDA is built by nvcc 13.0 for sm_80, sm_90, sm_100, compute_100"
    assert told in done.said.splitlines()
    (module,) = done.modules
    assert module.name == "racecar_kernels._CUDA" and {"csrc/cuda/binding.cpp", "csrc/cuda/fold.cu"} <= {
        *module.sources
    }
    assert "-gencode=arch=compute_90,code=sm_90" in module.extra_compile_args["nvcc"]
    assert ("RACECAR_CODES", '"sm_80,sm_90,sm_100,compute_100"') in module.define_macros
    assert module.extra_link_args == [f"{home}/lib64/libcudart.so"] and "cudart" not in module.libraries
    assert f"{home}/include" in module.include_dirs


def test_a_compiler_alone_is_linked_with_the_library_that_came_with_pytorch(
    decide, monkeypatch, tmp_path: Path
) -> None:
    home = toolkit(tmp_path / "cuda")
    (home / "lib64" / "libcudart.so").unlink()
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "site/torch/__init__.py"))
    alone = decide("13.2", RACECAR_BUILD_CUDA="auto", CUDA_HOME=str(home))
    assert "_CUDA is not built: no libcudart.so was found in" in alone.said
    library = tmp_path / "site/nvidia/cu13/lib/libcudart.so.13"
    library.parent.mkdir(parents=True)
    library.touch()
    (module,) = decide("13.2", RACECAR_BUILD_CUDA="auto", CUDA_HOME=str(home)).modules
    assert module.extra_link_args == [str(library)]


BROKEN = "libtorch_global_deps.so: cannot open shared object file"


@pytest.mark.parametrize(("switch", "status"), [("auto", 0), ("1", 1)])
def test_a_broken_pytorch_stops_no_installation(switch: str, status: int, tmp_path: Path) -> None:
    """One whose library is missing raises OSError where it is imported."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text(f"raise OSError({BROKEN!r})\n")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RACECAR")}
    environment = {**kept, "PYTHONPATH": str(tmp_path), "RACECAR_BUILD_CUDA": switch}
    done = subprocess.run(
        [sys.executable, "setup.py", "--name"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == status, done.stderr
    assert f"racecar_kernels._CUDA is not built: PyTorch cannot be imported at build time: {BROKEN}." in done.stderr
    assert "Traceback" not in done.stderr


def test_what_pytorch_raises_on_the_way_is_a_reason(decide, monkeypatch, tmp_path: Path) -> None:
    def without(*_, **__):
        raise OSError("CUDA_HOME environment variable is not set")

    monkeypatch.setattr(cpp_extension, "CUDAExtension", without)
    done = decide("13.2", RACECAR_BUILD_CUDA="auto", CUDA_HOME=str(toolkit(tmp_path / "cuda")))
    assert not done.modules and "_CUDA is not built: OSError: CUDA_HOME environment variable is not set." in done.said


@pytest.mark.parametrize("switch", ["", " ", "AUTO"])
def test_an_empty_switch_is_none(decide, switch: str) -> None:
    done = decide(None, RACECAR_BUILD_CUDA=switch)
    assert done.stopped is None and "_CUDA is not built: this PyTorch" in done.said


def test_a_wrong_switch_is_refused(decide) -> None:
    assert decide("13.0", RACECAR_BUILD_CUDA="yes").stopped == "RACECAR_BUILD_CUDA is auto, 0 or 1, got 'yes'"


@pytest.mark.parametrize("told", ["0", "", "many", "-1"])
def test_a_number_of_jobs_that_is_none_leaves_the_bound_of_the_memory(decide, told: str) -> None:
    decide("13.0", RACECAR_BUILD_CPP="auto", RACECAR_BUILD_CUDA="0", MAX_JOBS=told)
    assert int(os.environ["MAX_JOBS"]) >= 1
    decide("13.0", RACECAR_BUILD_CPP="auto", RACECAR_BUILD_CUDA="0", MAX_JOBS="3")
    assert os.environ["MAX_JOBS"] == "3"


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_what_fails_to_compile_leaves_the_other_module(tmp_path: Path) -> None:
    """The real thing, with two modules of a line each, of which one is wrong."""
    (tmp_path / "csrc/cuda").mkdir(parents=True)
    (tmp_path / "racecar_kernels").mkdir()
    for name in ("setup.py", "racecar_kernels/cuda_toolkit.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "csrc/module.cpp").write_text("this is no C++\n")
    (tmp_path / "csrc/cuda/module.cpp").write_text(MODULE)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RACECAR", "TORCH_CUDA"))}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # for ninja
    environment = {**kept, "PATH": path, "CUDA_HOME": str(toolkit(tmp_path / "cuda"))}
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    (tmp_path / "built/racecar_kernels").mkdir(parents=True)
    for name in ("_C", "_CUDA"):  # of an earlier build
        (tmp_path / f"built/racecar_kernels/{name}{suffix}").write_text("stale")
    # nothing is linked with CUDA: this PyTorch may have none
    code = (
        "import runpy, sys, torch, torch.utils.cpp_extension as build; torch.version.cuda = '13.0'; "
        "build.CUDAExtension = lambda *a, libraries=(), extra_link_args=(), extra_compile_args=(), **k: "
        "build.CppExtension(*a, libraries=['cudart'], **k); "
        "sys.argv = ['setup.py', 'build_ext', '--inplace', '--build-lib', 'built']; "
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "racecar_kernels._C is not built: compiling failed: " in done.stderr
    made = [path.name for path in (tmp_path / "racecar_kernels").glob("*.so")]
    assert made == [f"_CUDA{suffix}"], (made, done.stderr)
    (left,) = (tmp_path / "built/racecar_kernels").iterdir()
    assert (
        left.name == f"_CUDA{suffix}" and left.read_bytes() == (tmp_path / "racecar_kernels" / left.name).read_bytes()
    )


def test_what_is_not_to_be_built_is_not_taken_from_an_earlier_build(decide, tmp_path: Path) -> None:
    done = decide("13.0", RACECAR_BUILD_CPP="auto", RACECAR_BUILD_CUDA="0")
    command = done.commands["build_ext"](setuptools.Distribution({"name": "racecar", "ext_modules": done.modules}))
    command.build_lib = str(tmp_path)
    command.ensure_finalized()
    stale = [tmp_path / command.get_ext_filename(f"racecar_kernels.{name}") for name in ("_C", "_CUDA")]
    stale[0].parent.mkdir()
    for path in stale:
        path.write_text("stale")
    command.extensions = []  # nothing is compiled here
    command.run()
    assert not any(path.exists() for path in stale)


def test_a_compiler_is_found_behind_a_script_on_the_path(monkeypatch, tmp_path: Path) -> None:
    home = toolkit(tmp_path / "cuda", "12.9")
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "nvcc"
    script.write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    script.chmod(0o755)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
    assert cuda_toolkit.find() == cuda_toolkit.Nvcc(script, home.resolve(), (12, 9), frozenset({75, 80, 90, 100}))


def test_what_is_compiled_for() -> None:
    nvcc = cuda_toolkit.Nvcc(Path(), Path(), (12, 8), frozenset({75, 80, 86, 89, 90, 100, 120}))
    assert cuda_toolkit.codes(nvcc) == ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "compute_120")
    assert cuda_toolkit.codes(nvcc, "7.5 8.0;9.0a, 10.0+PTX") == ("sm_80", "sm_90a", "sm_100", "compute_100")
    assert cuda_toolkit.flags(("sm_90a", "compute_100")) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=compute_100",
    ]
    older = nvcc._replace(known=frozenset({75}))
    with pytest.raises(cuda_toolkit.ToolkitError, match="both sm_80 or newer and known to nvcc 12.8"):
        cuda_toolkit.codes(older)


@pytest.mark.parametrize(
    ("codes", "gpu", "runs"),
    [
        (("sm_80",), (8, 0), True),
        (("sm_80",), (8, 9), True),
        (("sm_86",), (8, 0), False),
        (("sm_80",), (9, 0), False),
        (("sm_80", "compute_80"), (12, 0), True),
        (("compute_90",), (8, 0), False),
        (("sm_90a", "compute_90a"), (10, 0), False),
        (("sm_90a",), (9, 0), True),
        (("sm_100f",), (10, 3), True),
        (("sm_100a",), (10, 3), False),
        ((), (9, 0), False),
    ],
)
def test_what_a_gpu_runs(codes: tuple[str, ...], gpu: tuple[int, int], runs: bool) -> None:
    assert cuda_toolkit.runs_on(codes, gpu) == runs


def test_compilations_at_a_time_are_bounded_by_memory(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    assert cuda_toolkit.free_memory(tmp_path) is None
    (tmp_path / "proc/meminfo").write_text("MemTotal: 99 kB\nMemAvailable:    8388608 kB\n")
    assert cuda_toolkit.free_memory(tmp_path) == 8 << 30
    (tmp_path / "sys/fs/cgroup/memory.current").write_text(f"{1 << 30}\n")
    (tmp_path / "sys/fs/cgroup/memory.stat").write_text(f"file {3 << 29}\ninactive_file {1 << 29}\nactive_file 9\n")
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert cuda_toolkit.free_memory(tmp_path) == 8 << 30
    (tmp_path / "sys/fs/cgroup/memory.max").write_text(f"{7 << 30}\n")
    assert cuda_toolkit.free_memory(tmp_path) == 13 << 29  # 7 - 1 + 0.5 GiB
    (tmp_path / "sys/fs/cgroup/memory.stat").unlink()
    assert cuda_toolkit.free_memory(tmp_path) == 6 << 30
    (tmp_path / "sys/fs/cgroup/memory.max").write_text(f"{1 << 40}\n")
    assert cuda_toolkit.free_memory(tmp_path) == 8 << 30
    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    for free, jobs in ((6 << 30, 2), (1 << 20, 1), (1 << 40, 16), (None, 16)):
        monkeypatch.setattr(cuda_toolkit, "free_memory", lambda free=free: free)
        assert cuda_toolkit.jobs() == jobs
    monkeypatch.setenv("MAX_JOBS", "5")
    assert cuda_toolkit.jobs() == 5


def test_no_compiler_at_all(monkeypatch, tmp_path: Path) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(Path, "is_file", lambda _: False)
    with pytest.raises(cuda_toolkit.NoCompilerError, match="not on PATH, not in /usr/local/cuda, and CUDA_HOME is not"):
        cuda_toolkit.find()
