"""Packages of the `demo` extra, imported where they are used."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def optional(module: str, purpose: str) -> Any:
    """Imports a module of a package that need not be there.

    Raises:
        ModuleNotFoundError: it is not, with the command that installs it.
    """
    package = module.split(".")[0]
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != package:
            raise
        sentence = f"{purpose} needs {package}, which is not installed: pip install 'racecar-kernels[demo]'"
        raise ModuleNotFoundError(sentence, name=package) from error
