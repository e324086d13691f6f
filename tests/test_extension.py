"""The loader of the compiled extension: in use, absent, broken, or built for another PyTorch."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import torch

from racecar_kernels import extension

pytestmark = pytest.mark.filterwarnings("ignore:racecar_kernels. the compiled extension is not used")


@pytest.fixture(autouse=True)
def _fresh_loader():
    for cached in (extension._found, extension.warn_once):
        cached.cache_clear()
    yield
    for cached in (extension._found, extension.warn_once):
        cached.cache_clear()


def pretend(monkeypatch, result):
    """Makes the import of the extension return `result`, or raise it; whatever file is there is not looked at."""
    monkeypatch.setattr(extension, "FOLDER", Path("no such folder"))

    def import_module(name):
        assert name == "racecar_kernels._C"
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(extension.importlib, "import_module", import_module)


def built_for(version):
    needed = dict.fromkeys(extension.NEEDED[extension.CPP])
    return types.SimpleNamespace(build_facts=lambda: {"torch": version}, **needed)


def test_it_is_in_use_or_says_why_not():
    module, reason = extension.load(), extension.why_not()
    assert (module is None) == (reason is not None)
    if module is None:
        assert "pip install --no-build-isolation" in reason
        pytest.skip(reason)
    facts = module.build_facts()
    assert facts["torch"] == torch.__version__.split("+")[0]
    assert facts["threads"] == torch.get_num_threads()
    assert facts["cxx"] >= 201703 and facts["compiler"] != "unknown"


def test_built_for_this_version(monkeypatch):
    module = built_for(torch.__version__.split("+")[0])
    pretend(monkeypatch, module)
    assert extension.load() is module and extension.why_not() is None


def test_built_from_older_sources(monkeypatch):
    module = built_for(torch.__version__.split("+")[0])
    del module.Tape
    pretend(monkeypatch, module)
    assert extension.load() is None
    assert "it was built from other sources than these, and has no Tape. To rebuild it" in extension.why_not()


def test_not_built(monkeypatch):
    pretend(monkeypatch, ModuleNotFoundError("No module named 'racecar_kernels._C'", name="racecar_kernels._C"))
    assert extension.load() is None
    assert extension.why_not().startswith("not built") and "pip install --no-build-isolation" in extension.why_not()


def test_built_for_another_version(monkeypatch):
    pretend(monkeypatch, built_for("2.0.1"))
    assert extension.load() is None
    assert "built for PyTorch 2.0.1, but" in extension.why_not() and "To rebuild it" in extension.why_not()


@pytest.mark.parametrize(
    "error",
    [ImportError("_C.so: undefined symbol: _ZN2at4nameE"), ModuleNotFoundError("No module named 'gone'", name="gone")],
    ids=["symbol", "module"],
)
def test_the_text_of_what_failed_is_kept(monkeypatch, error):
    pretend(monkeypatch, error)
    assert extension.load() is None
    assert str(error) in extension.why_not() and "To rebuild it" in extension.why_not()
