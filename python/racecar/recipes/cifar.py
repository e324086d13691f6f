"""Recipe `cifar`: CIFAR-10, then CIFAR-100, or one half of CIFAR-10's classes and then the other.

Xie & Thuerey 2020, Tables 5 and 11: 13 convolutions with batch norm learn CIFAR-10 (A) in several ways, and go on, on
CIFAR-10 (AA) and on CIFAR-100 (AB). Table 11 also normalises what comes back at the input, with parameters that the
forward pass lacks; Eq. 24 of the 2021 paper does not, and neither does this recipe.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from ..data import DataError, ImageData, load_images
from ..data.cifar import cifar_files
from ..experiments.contestants import CONTESTANTS, SCRATCH, STD_FOR_LONG
from ..experiments.jobs import Leg
from ..experiments.tasks import Task, fingerprint
from .listener import Listener
from .networks import cifar_network
from .picture_sets import in_colour, part_of, stand_in, task_of
from .study import PHASE_I, Settings, Study, Tasks
from .study_results import run_study

__all__ = ["STUDY", "Listener", "Settings", "run"]

SIDE = 32


def first_task(settings: Settings, data: Path | None) -> ImageData:
    """CIFAR-10, from wherever it is."""
    if data is None:
        return stand_in(settings.limit, settings.test_limit, SIDE)
    data = data.expanduser()
    found = cifar_files(data, "CIFAR-10")
    if found is None and cifar_files(data, "CIFAR-100") is not None:
        raise DataError(f"{data}: holds CIFAR-100, which is task B, but not CIFAR-10; put its files beside them")
    return read_images(data if found is None else found[1], settings)


def read_images(source: Path, settings: Settings) -> ImageData:
    """At the size of CIFAR, limited as the settings say."""
    limit, test_limit = settings.limit or None, settings.test_limit or None
    return in_colour(load_images(source, limit=limit, test_limit=test_limit, size=SIDE), SIDE)


def at_least(limit: int, classes: int) -> int:
    """A limit that leaves every class an image; 0: none."""
    return max(limit, classes) if limit else 0


def tasks(settings: Settings, data: Path | None) -> Tasks:
    """A and B: CIFAR-10 and CIFAR-100 where the user has both, else both halves of the classes.

    Args:
        settings: limits and size.
        data: a folder with the official files of CIFAR-10, and of CIFAR-100 for task B; or an image folder; None: a
            stand-in, only to see that it runs.
    """
    first = first_task(settings, data)
    hundred = None if data is None else cifar_files(data.expanduser(), "CIFAR-100")
    if hundred is not None:
        enough = replace(settings, limit=at_least(settings.limit, 100), test_limit=at_least(settings.test_limit, 100))
        second = read_images(hundred[1], enough)
        a, b, sizes = task_of(first), task_of(second), (len(first.classes), len(second.classes))
        note = f"Task B: {second.describe()}."
    else:
        if len(first.classes) < 4:
            raise DataError(
                f"{first.name} has {len(first.classes)} classes; at least 4 are needed, two for task A and two for B, "
                f"where CIFAR-100 is not beside it"
            )
        half = (len(first.classes) + 1) // 2
        a, b = (part_of(task_of(first), labels) for labels in (range(half), range(half, len(first.classes))))
        sizes = (half, len(first.classes) - half)
        note = (
            f"No CIFAR-100 beside it, so that the tasks are others than the paper's: A is "
            f"{', '.join(first.classes[:half])}; B is {', '.join(first.classes[half:])}."
        )
    of: dict[str, Task] = {PHASE_I: a, "AA": a, "AB": b}
    return Tasks(
        of=of,
        classes={PHASE_I: sizes[0], "AA": sizes[0], "AB": sizes[1]},
        fresh=frozenset({"AB"}),
        source=first.describe(),
        as_published=data is not None,
        notes=(*first.notes, note),
        fingerprint=fingerprint({"A": a, "B": b}),
    )


_STD, _ORT, _, _, _RR, _ = CONTESTANTS
STUDY = Study(
    recipe="cifar",
    title="CIFAR-10, then other classes",
    legs=(Leg(PHASE_I, "I"), Leg("AA", "AA", PHASE_I), Leg("AB", "AB", PHASE_I)),
    columns={PHASE_I: "A", "AA": "AA", "AB": "AB"},
    models=(_STD, _ORT, _RR, STD_FOR_LONG, SCRATCH),
    network=cifar_network,
    tasks=tasks,
    paper={"Std": {"AA": 0.805, "AB": 0.183}, "RR": {"AA": 0.856, "AB": 0.276}, SCRATCH.name: {"AB": 0.253}},
    explained="Paper's AB: CIFAR-100. A: with the pretraining. AA: on with A without it. AB: on with B, with a fresh "
    "last layer. From scratch: AB with fresh weights. Std, same time: so many epochs more in A that they take as long "
    "as RR's.",
    scratch=("AB",),
)

run = partial(run_study, STUDY)
