"""Recipe `texture-shape`: which shape it is, in images whose textures were taken from other objects.

The 2021 paper trains on 1120 of the 1280 stylised images of Geirhos et al. 2019, 16 classes of shape, and tests on the
other 160, and on the edges and filled silhouettes of the same objects. Every image is one of 160 outlines with one of
48 textures: were they split one by one, a network would be tested on outlines that it has been trained on. So whole
outlines are held out here, about 160 images.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ..data import load_images
from ..experiments.contestants import CONTESTANTS, STD_FOR_LONG
from ..experiments.jobs import Leg
from ..experiments.tasks import fingerprint
from .listener import Listener
from .networks import cifar_network
from .picture_sets import in_colour, stand_in, task_of, whole
from .study import PHASE_I, Settings, Study, Tasks
from .study_results import run_study

__all__ = ["STUDY", "Listener", "Settings", "run"]

TEST_PART = 1 / 8  # of the images: 160 of 1280
STYLISED = ("style-transfer-preprocessed-512", "stylized-128.zip", "stylized.zip", "stylized")
FURTHER = {"edges": ("edges", "edges.zip"), "filled": ("filled-silhouettes", "filled", "filled.zip")}


def shape_of(name: str) -> str:
    """airplane10 of airplane10-bicycle2.jpg: the same outlines come with several textures."""
    return name.partition("-")[0]


def tasks(settings: Settings, data: Path | None) -> Tasks:
    """The stylised images; edges and silhouettes where they lie beside them.

    Args:
        settings: limits and size.
        data: the stylised images as a folder or zip of class folders; or a folder that holds them, and `edges` and
            `filled-silhouettes` beside them, as the stimuli were published; None: a stand-in, only to see that it runs.
    """
    if data is None:
        read, further, missing = stand_in(settings.limit, settings.test_limit, settings.size), {}, list(FURTHER)
    else:
        data = data.expanduser()
        source = next((data / name for name in STYLISED if (data / name).exists()), data)
        read = load_images(
            source,
            limit=settings.limit or None,
            test_limit=settings.test_limit or None,
            size=settings.size,
            test_fraction=TEST_PART,
            group=shape_of,
        )
        read = in_colour(read, settings.size)
        beside = data if source != data else data.parent
        found = {
            column: next((beside / name for name in names if (beside / name).exists()), None)
            for column, names in FURTHER.items()
        }
        further = {
            column: ("AA", *whole(place, read.classes, settings.size)) for column, place in found.items() if place
        }
        missing = [column for column, place in found.items() if place is None]
    a = task_of(read)
    note = [f"Not tested, since they are not beside the data: {', '.join(missing)}."] if missing else []
    return Tasks(
        of={PHASE_I: a, "AA": a},
        classes=dict.fromkeys((PHASE_I, "AA"), len(read.classes)),
        source=read.describe(),
        as_published=data is not None,
        notes=(*read.notes, *note),
        further=further,
        groups=tuple(map(shape_of, read.train_names)),
        fingerprint=fingerprint({"A": a}),
    )


_STD, _ORT, _PRE, _, _RR, _ = CONTESTANTS
STUDY = Study(
    recipe="texture-shape",
    title="shapes in other objects' textures",
    legs=(Leg(PHASE_I, "I"), Leg("AA", "AA", PHASE_I)),
    columns={PHASE_I: "A", "AA": "AA"},
    models=(_STD, _ORT, _PRE, _RR, STD_FOR_LONG),
    network=cifar_network,
    tasks=tasks,
    paper={"Std": {"AA": 0.442}, "Ort": {"AA": 0.470}, "Pre": {"AA": 0.208}, "RR": {"AA": 0.547}},
    explained="A: with the pretraining; Pre sees no labels there, and all its layers together are given as many epochs "
    "as the others. AA: on with A without it. The paper's network is another one. Std, same time: so many epochs more "
    "in A that they take as long as RR's.",
)

run = partial(run_study, STUDY)
