"""Recipe `resnet110`: a deep residual network on CIFAR-10, tested on CIFAR-10.1 as well.

The 2021 paper trains ResNet-110 (He et al. 2016) with the reverse pass of every layer by itself, and tests it on the
newer photographs of CIFAR-10.1 (Recht et al. 2018) too. Optimiser, schedule and augmentation are those of He et al.
2016, section 4.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ..data import DataError
from ..data.augment import crop_and_flip
from ..data.cifar import cifar10_1
from ..experiments.contestants import CONTESTANTS, STD_FOR_LONG
from ..experiments.jobs import Leg
from ..experiments.tasks import fingerprint
from .cifar import first_task
from .listener import Listener
from .networks import residual_network
from .picture_sets import task_of
from .study import PHASE_I, Settings, Study, Tasks
from .study_results import run_study

__all__ = ["STUDY", "Listener", "Settings", "run"]

NEWER = ("cifar10.1_v6_data.npy", "cifar10.1_v4_data.npy")
WARM_UP = 0.1  # of the learning rate, in the first epoch: a network this deep does not begin to learn otherwise


def tasks(settings: Settings, data: Path | None) -> Tasks:
    """CIFAR-10, and CIFAR-10.1 where its files lie beside it.

    Args:
        settings: limits and size.
        data: a folder with the official files of CIFAR-10, and of CIFAR-10.1 for the second column; or an image
            folder; None: a stand-in, only to see that it runs.
    """
    read = first_task(settings, data)
    a = task_of(read)
    further, notes = {}, list(read.notes)
    places = (
        [] if data is None else [data.expanduser(), data.expanduser() / "cifar10.1", data.expanduser() / "CIFAR-10.1"]
    )
    newer = next((place for place in places if any((place / name).exists() for name in NEWER)), None)
    if newer is not None:
        if len(read.classes) != 10:
            raise DataError(f"{newer} holds CIFAR-10.1, of 10 classes; the data beside it have {len(read.classes)}")
        further["CIFAR-10.1"] = (PHASE_I, *cifar10_1(newer))
    else:
        notes.append("CIFAR-10.1 is not tested: its files are not beside the data.")
    return Tasks(
        of={PHASE_I: a},
        classes={PHASE_I: len(read.classes)},
        source=read.describe(),
        notes=tuple(notes),
        further=further,
        fingerprint=fingerprint({"A": a}),
    )


def momentum(settings: Settings, phase: str) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """Stochastic gradient descent with momentum and weight decay."""
    return partial(torch.optim.SGD, lr=settings.learning_rate, momentum=0.9, weight_decay=1e-4)


def schedule(settings: Settings, epochs: int) -> Callable[[torch.optim.Optimizer], Any]:
    """A tenth in the first epoch, and again from half of the epochs on; a hundredth from three quarters on."""
    return partial(LambdaLR, lr_lambda=partial(factor, epochs))


def factor(epochs: int, epoch: int) -> float:
    """Of the learning rate."""
    if epoch == 0 and epochs > 4:
        return WARM_UP
    return 1.0 if epoch < epochs / 2 else 0.1 if epoch < 3 * epochs / 4 else 0.01


_STD, _ORT, *_, _LOCAL = CONTESTANTS
STUDY = Study(
    recipe="resnet110",
    title="a residual network on CIFAR-10",
    legs=(Leg(PHASE_I, "I"),),
    columns={PHASE_I: "CIFAR-10"},
    models=(_STD, _ORT, _LOCAL, replace(STD_FOR_LONG, title="plain, as long as RR local", as_long_as=_LOCAL.name)),
    network=residual_network,
    tasks=tasks,
    paper={},
    explained="The 2021 paper gives differences: RR is .0028 above Ort and .0067 above Std on CIFAR-10, .0022 and "
    ".0095 on CIFAR-10.1. The reverse pass takes part in all epochs. Std, same time: so many epochs more that they "
    "take as long as those of RR local.",
    optimizer=momentum,
    scheduler=schedule,
    augment=crop_and_flip,
)

run = partial(run_study, STUDY)
