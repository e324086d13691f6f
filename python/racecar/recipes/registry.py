"""Which recipes there are. What one does is imported when it runs, so that `racecar run --help` is quick."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """An experiment of one of the papers.

    Attributes:
        name: on the command line.
        shows: what it shows, in a line.
        paper: where it stands.
        data: what `--data` takes, and what happens without it.
        module: of this package; it has `run(settings, folder, listener)` and `Settings`.
        unit: what the progress bar counts.
        presets: name -> settings that differ from the defaults of `Settings`; the first is the default, "quick" is
            what `--quick` stands for.
    """

    name: str
    shows: str
    paper: str
    data: str
    module: str
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    unit: str = "epochs"

    def part(self, name: str) -> Any:
        """An attribute of the recipe's module."""
        return getattr(import_module(f".{self.module}", __package__), name)

    def settings(self, preset: str, **given: Any) -> Any:
        """The settings of a preset, with those that are given in their place.

        Raises:
            SettingsError: there is no such preset, or a value cannot be used.
        """
        from ..experiments.folder import SettingsError

        if preset not in self.presets:
            raise SettingsError(f"preset must be one of {', '.join(self.presets)}, got {preset!r}")
        return self.part("Settings")(**{"preset": preset, **self.presets[preset], **given})

    @property
    def run(self) -> Callable[..., Any]:
        """Runs it; see the module."""
        return self.part("run")


TABLE_9 = {"input_activation": "relu"}  # of the 2020 paper: applied to what comes back at the input
RESIDUAL = {"learning_rate": 0.1, "batch_size": 128}  # He et al. 2016

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="mi",
            shows="Where a small tanh network keeps its information, and what that is worth when labels are swapped.",
            paper="Xie & Thuerey 2020, Tables 1 and 2, on the 4096 patterns of Shwartz-Ziv & Tishby 2017",
            data="The study's var_u.mat. \\[default: the same 4096 patterns, generated from its description]",
            module="mi",
            presets={
                "cpu": {"epochs": 4000, "transfer_epochs": 12000},
                "paper": {},
                "quick": {"seeds": 2, "epochs": 30, "transfer_epochs": 20},
            },
        ),
        Recipe(
            name="peak",
            shows="Whether a first layer's singular vectors are what two classes of peaks look like.",
            paper="Xie & Thuerey 2020, section 3, and the authors' published example",
            data="A folder with 0.png to 54.png in 0 and in 1, 28×28. \\[default: generated peaks among scribbles]",
            module="peak",
            presets={"paper": {"epochs": 5000, "lam": 1e-6}, "quick": {"seeds": 1, "epochs": 100, "lam": 1e-6}},
        ),
        Recipe(
            name="mnist-svd",
            shows="Whether two digits lie in the span of a layer's singular vectors.",
            paper="Xie & Thuerey 2020, section 3, and the authors' published example",
            data="The official MNIST files, or other square grey images. \\[default: scikit-learn's digits, 8×8]",
            module="mnist_svd",
            presets={"paper": {}, "once": {"twice": False}, "quick": {"seeds": 2, "epochs": 100}},
        ),
        Recipe(
            name="mnist",
            shows="Whether what digits teach helps with blurred digits.",
            paper="Xie & Thuerey 2020, Tables 3, 4 and 9",
            data="A folder with the official MNIST files, and n-MNIST's motion blur; or other images. "
            "\\[default: scikit-learn's digits, 8×8]",
            module="mnist",
            presets={
                "cpu": {"limit": 10000, "test_limit": 5000, "epochs": 4, "transfer_epochs": 4, **TABLE_9},
                "paper": {"epochs": 20, "transfer_epochs": 20, **TABLE_9},
                "quick": {"seeds": 2, "limit": 200, "test_limit": 100, "epochs": 2, "transfer_epochs": 1, **TABLE_9},
            },
            unit="steps",
        ),
        Recipe(
            name="cifar",
            shows="Whether what CIFAR-10 teaches helps with other classes.",
            paper="Xie & Thuerey 2020, Tables 5 and 11",
            data="A folder with the official files of CIFAR-10, and of CIFAR-100; or an image folder, whose classes "
            "are shared out between both tasks. \\[default: a stand-in, only to see that it runs]",
            module="cifar",
            presets={
                "cpu": {
                    "limit": 4000,
                    "test_limit": 2000,
                    "epochs": 10,
                    "transfer_epochs": 10,
                    "divisor": 4,
                    "lam": 0.1,
                },
                "paper": {"epochs": 50, "transfer_epochs": 50, "lam": 0.1},
                "quick": {
                    "seeds": 2,
                    "limit": 40,
                    "test_limit": 40,
                    "epochs": 2,
                    "transfer_epochs": 1,
                    "divisor": 8,
                    "batch_size": 16,
                },
            },
            unit="steps",
        ),
        Recipe(
            name="resnet110",
            shows="Whether a local reverse pass helps a deep residual network, on newer photographs as well.",
            paper="Xie et al. 2021, ResNet-110 on CIFAR-10 and CIFAR-10.1",
            data="A folder with the official files of CIFAR-10, and of CIFAR-10.1; or an image folder. "
            "\\[default: a stand-in, only to see that it runs]",
            module="resnet110",
            presets={
                "cpu": {
                    "seeds": 3,
                    "limit": 3500,
                    "test_limit": 2000,
                    "epochs": 10,
                    "blocks": 3,
                    "batch_size": 32,
                    "learning_rate": 0.05,
                    "lam": 0.01,
                },
                "paper": {"epochs": 164, "lam": 0.01, **RESIDUAL},
                "quick": {
                    "seeds": 2,
                    "limit": 40,
                    "test_limit": 40,
                    "epochs": 2,
                    "divisor": 4,
                    "blocks": 1,
                    **RESIDUAL,
                },
            },
            unit="steps",
        ),
        Recipe(
            name="texture-shape",
            shows="Whether a network sees shapes through textures of other objects.",
            paper="Xie et al. 2021, on the stylised images of Geirhos et al. 2019",
            data="The stylised images as a folder or zip of class folders, or a folder with them, edges and "
            "filled-silhouettes in it. \\[default: a stand-in, only to see that it runs]",
            module="texture_shape",
            presets={
                "cpu": {"size": 32, "epochs": 20, "transfer_epochs": 20, "divisor": 4, "lam": 0.01},
                "paper": {"size": 128, "epochs": 100, "transfer_epochs": 100, "lam": 0.01},
                "quick": {
                    "seeds": 2,
                    "limit": 40,
                    "test_limit": 40,
                    "size": 16,
                    "epochs": 2,
                    "transfer_epochs": 1,
                    "divisor": 8,
                    "batch_size": 16,
                },
            },
            unit="steps",
        ),
    )
}
