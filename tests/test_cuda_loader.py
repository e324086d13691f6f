"""Loading `_CUDA`: the modules that are refused, and the sentences that say why."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import types
from pathlib import Path

import pytest
import torch

from racecar_kernels import cuda_toolkit, extension

ROOT = Path(__file__).resolve().parent.parent
RUNNING = torch.__version__.split("+")[0]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the CUDA kernels are built on Linux")


@pytest.fixture
def loader(monkeypatch):
    """The loader, emptied, in a PyTorch with CUDA 13; what is imported as `_CUDA` is what its caller says."""
    caches = (extension._found, extension._of_gpu, extension.warn_once)
    for cached in caches:
        cached.cache_clear()
    monkeypatch.setattr(extension, "FOLDER", Path("no such folder"))
    monkeypatch.setattr(torch.version, "cuda", "13.2")

    def imports(result, driver=(13, 0), gpus=((9, 0),)):
        def import_module(name):
            assert name == "racecar_kernels._CUDA"
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setattr(extension.importlib, "import_module", import_module)
        monkeypatch.setattr(cuda_toolkit, "driver_version", lambda: driver)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpus[index])

    yield imports
    for cached in caches:
        cached.cache_clear()


def built(**facts):
    own = {"torch": RUNNING, "cuda": (13, 0), "codes": ("sm_80", "sm_90"), **facts}
    return types.SimpleNamespace(build_facts=lambda: own, **dict.fromkeys(extension.NEEDED[extension.CUDA]))


def test_a_folder_in_its_place_is_refused(monkeypatch, loader, tmp_path: Path) -> None:
    loader(ModuleNotFoundError("No module named 'racecar_kernels._CUDA'", name="racecar_kernels._CUDA"))
    monkeypatch.setattr(extension, "FOLDER", tmp_path)
    path = tmp_path / f"_CUDA{sysconfig.get_config_var('EXT_SUFFIX')}"
    path.mkdir()
    assert extension.why_not(extension.CUDA, warn=False).startswith(f"not used: {path.name} is no file. To rebuild")


def test_one_that_may_not_be_read_is_refused(monkeypatch, loader, tmp_path: Path) -> None:
    loader(ImportError("_CUDA.so: cannot open shared object file: Permission denied"))
    monkeypatch.setattr(extension, "FOLDER", tmp_path)
    (tmp_path / f"_CUDA{sysconfig.get_config_var('EXT_SUFFIX')}").touch()

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    assert "it cannot be loaded: _CUDA.so: cannot open" in extension.why_not(extension.CUDA, warn=False)


def test_of_a_module_its_header_alone_is_read(monkeypatch, tmp_path: Path) -> None:
    path = tmp_path / f"_CUDA{sysconfig.get_config_var('EXT_SUFFIX')}"
    path.write_bytes(b"\x7fELF\x02\x01" + bytes(94))
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("all of it was read"))
    assert extension._cut_off(path) is None
    path.write_bytes(b"\x7fELF\x02\x01" + bytes(34) + (200).to_bytes(8, "little") + bytes(52))
    assert extension._cut_off(path) == f"{path.name} is cut off: 100 bytes of at least 200"


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (ImportError("_CUDA.so: undefined symbol: _ZN2at4nameE"), "built for another PyTorch than .*_ZN2at4nameE"),
        (ImportError("libcudart.so.13: cannot open shared object file"), "cannot be loaded: libcudart.so.13"),
        (ModuleNotFoundError("No module named 'gone'", name="gone"), "needs a module that is missing: .*'gone'"),
        (OSError("no luck"), "its initialisation failed: OSError: no luck"),
        (built(torch="2.0.1"), "it was built for PyTorch 2.0.1, but .* is running"),
        (built(cuda=(12, 8)), "it was built for a PyTorch with CUDA 12, this one has 13.2"),
        (
            types.SimpleNamespace(build_facts=built().build_facts),
            "other sources than these, and has no LinearChain, few",
        ),
        (built(cuda=()), "does not say which PyTorch it was built for .IndexError"),
        (types.SimpleNamespace(), "does not say which PyTorch it was built for .AttributeError"),
    ],
)
def test_a_module_that_does_not_fit_is_refused_with_the_text_of_what_failed(loader, result, says: str) -> None:
    loader(result)
    with pytest.warns(
        RuntimeWarning, match=f"the compiled CUDA extension is not used: .*{says}.*Triton and plain PyTorch"
    ):
        assert extension.load(extension.CUDA) is None
    assert "To rebuild it, in the source folder: pip install" in extension.why_not(extension.CUDA)  # and warns no more


def test_one_that_was_never_built_is_no_reason_to_warn(loader, recwarn) -> None:
    loader(ModuleNotFoundError("No module named 'racecar_kernels._CUDA'", name="racecar_kernels._CUDA"))
    assert extension.load(extension.CUDA) is None and not recwarn.list
    assert extension.why_not(extension.CUDA).startswith("not built; to build it, with nvcc and a C++ compiler, in the")


def test_a_pytorch_without_cuda_needs_none_and_takes_none(loader, monkeypatch, tmp_path: Path, recwarn) -> None:
    loader(AssertionError("it must not be imported"))
    monkeypatch.setattr(torch.version, "cuda", None)
    sentence = f"this PyTorch, {torch.__version__}, is one without CUDA"
    assert extension.why_not(extension.CUDA) == f"not built: {sentence}" and not recwarn.list
    extension.forget()
    monkeypatch.setattr(extension, "FOLDER", tmp_path)
    (tmp_path / f"_CUDA{extension.sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"x" * 100)
    sentence = f"it was built for a PyTorch with CUDA; this one, {torch.__version__}, has none. To rebuild it"
    assert extension.why_not(extension.CUDA, warn=False).startswith(f"not used: {sentence}")


@pytest.mark.parametrize(
    ("driver", "gpus", "says"),
    [
        (None, (), "not used: no GPU is visible, and no NVIDIA driver is installed"),
        ((13, 0), (), "not used: no GPU is visible; is CUDA_VISIBLE_DEVICES set?"),
        ((12, 9), (), "not used: it needs a driver for CUDA 13, the one installed serves CUDA 12.9 and older"),
        ((13, 0), ((7, 5),), "not used: it needs a GPU from sm_80 on, this one is sm_75"),
        (
            (13, 0),
            ((12, 0),),
            "not used: it was compiled for the GPUs sm_80, sm_90, this one is sm_120. To rebuild it,",
        ),
        ((13, 0), ((8, 6),), None),
        ((14, 1), ((9, 0),), None),
    ],
)
def test_what_a_gpu_or_its_driver_lacks_is_said(loader, driver, gpus, says: str | None, recwarn) -> None:
    module = built()
    loader(module, driver, gpus)
    assert extension.load(extension.CUDA) is module  # it fits, and can be asked how it was built
    reason = extension.why_not(extension.CUDA)
    assert (reason is None) == (says is None) and (reason or "").startswith(says or "")
    assert not recwarn.list


def test_every_gpu_is_asked_for_itself(loader) -> None:
    loader(built(), gpus=((9, 0), (7, 0)))
    assert extension.why_not_on(0) is None and "this one is sm_70" in extension.why_not_on(1)
    assert extension.why_not(extension.CUDA) is None


def test_an_import_of_the_package_loads_no_compiled_module() -> None:
    code = "import sys, racecar_kernels, racecar; print([m for m in sys.modules if m.startswith('racecar_kernels._')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
