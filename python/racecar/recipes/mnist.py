"""Recipe `mnist`: digits, then the same digits in motion-blurred images.

Xie & Thuerey 2020, Tables 3, 4 and 9: three convolutions learn MNIST (A) in several ways, and go on, on MNIST (AA) and
on n-MNIST with motion blur (AB; Basu et al. 2017).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ..data import DIGITS, load_images, motion_blur
from ..experiments.contestants import CONTESTANTS, SCRATCH, STD_FOR_LONG
from ..experiments.jobs import Leg
from ..experiments.tasks import Task, fingerprint
from .listener import Listener
from .networks import mnist_network
from .study import PHASE_I, Settings, Study, Tasks
from .study_results import run_study

__all__ = ["STUDY", "Listener", "Settings", "run"]

BLUR, ANGLE = 5.0, 15.0  # of n-MNIST: a camera moved by 5 pixels at 15°
MAX_SIDE = 32


def tasks(settings: Settings, data: Path | None) -> Tasks:
    """A: digits. B: the same, blurred.

    Args:
        settings: limits and size.
        data: the official MNIST files, or other images that `racecar.data.load_images` reads; None: scikit-learn's
            digits, 8×8.
    """
    read = load_images(
        DIGITS if data is None else str(data),
        limit=settings.limit or None,
        test_limit=settings.test_limit or None,
        size=settings.size or None,
        max_side=MAX_SIDE,
    )
    length = max(1.0, BLUR * min(1.0, read.image_shape[2] / 28))  # smaller images than MNIST's are blurred less
    a = Task(read.train_x, read.train_y, read.test_x, read.test_y)
    blurred_x, blurred_test_x = (motion_blur(x, length, ANGLE) for x in (a.train_x, a.test_x))
    b = Task(blurred_x, a.train_y, blurred_test_x, a.test_y)
    of = {PHASE_I: a, "AA": a, "AB": b}
    return Tasks(
        of=of,
        classes=dict.fromkeys(of, len(read.classes)),
        source=read.describe(),
        as_published=read.image_shape == (1, 28, 28),
        notes=(*read.notes, f"Task B: the same images, blurred over {length:.3g} pixels at {ANGLE:g}°."),
        fingerprint=fingerprint({"A": a}),
    )


_STD, _ORT, _, _, _RR, _ = CONTESTANTS
STUDY = Study(
    recipe="mnist",
    title="digits, then blurred digits",
    legs=(Leg(PHASE_I, "I"), Leg("AA", "AA", PHASE_I), Leg("AB", "AB", PHASE_I)),
    columns={PHASE_I: "A", "AA": "AA", "AB": "AB"},
    models=(_STD, _ORT, _RR, STD_FOR_LONG, SCRATCH),
    network=mnist_network,
    tasks=tasks,
    paper={
        "Std": {"AA": 0.984, "AB": 0.952},
        "Ort": {"AA": 0.981, "AB": 0.913},
        "RR": {"AA": 0.986, "AB": 0.961},
        SCRATCH.name: {"AB": 0.929},
    },
    explained="A: MNIST, with the pretraining. AA: on with A without it. AB: on with motion-blurred digits. From "
    "scratch: AB with fresh weights. Std, same time: so many epochs more in A that they take as long as RR's.",
    scratch=("AB",),
)

run = partial(run_study, STUDY)
