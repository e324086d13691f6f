"""Recipe `mnist`: digits, then the same digits in motion-blurred images.

Xie & Thuerey 2020, Tables 3, 4 and 9: three convolutions learn MNIST (A) in several ways, and go on, on MNIST (AA) and
on n-MNIST with motion blur (AB; Basu et al. 2017).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ..data import DIGITS, DataError, load_images, motion_blur
from ..data.matlab import blurred_digits
from ..experiments.contestants import CONTESTANTS, SCRATCH, STD_FOR_LONG
from ..experiments.jobs import Leg
from ..experiments.tasks import Task, fingerprint
from .listener import Listener
from .networks import mnist_network
from .picture_sets import task_of
from .study import PHASE_I, Settings, Study, Tasks
from .study_results import run_study

__all__ = ["STUDY", "Listener", "Settings", "run"]

BLUR, ANGLE = 5.0, 15.0  # of n-MNIST: a camera moved by 5 pixels at 15°
MAX_SIDE = 32


def tasks(settings: Settings, data: Path | None) -> Tasks:
    """A: digits. B: the same, blurred: n-MNIST's where it lies beside them, else blurred here.

    Args:
        settings: limits and size.
        data: a folder with the official MNIST files, and n-MNIST's `mnist-with-motion-blur.mat` (or .gz) for task B; or
            other images that `racecar.data.load_images` reads; None: scikit-learn's digits, 8×8.

    Raises:
        DataError: as `racecar.data.load_images`, or tasks that differ in classes or in the shape of images.
    """
    limited = partial(load_images, limit=settings.limit or None, test_limit=settings.test_limit or None)
    read = limited(DIGITS if data is None else str(data), size=settings.size or None, max_side=MAX_SIDE)
    a = task_of(read)
    published = None if data is None else blurred_digits(data.expanduser())
    if published is not None:
        second = limited(published)
        for what, ours, theirs in (
            ("classes", len(read.classes), len(second.classes)),
            ("images of shape", read.image_shape, second.image_shape),
        ):
            if ours != theirs:
                raise DataError(f"{published} has {what} {theirs}, the digits beside it {ours}; both tasks must agree")
        b, note = task_of(second), f"Task B: {second.describe()}."
    else:
        length = max(1.0, BLUR * min(1.0, read.image_shape[2] / 28))  # smaller images than MNIST's are blurred less
        blurred_x, blurred_test_x = (motion_blur(x, length, ANGLE) for x in (a.train_x, a.test_x))
        b = Task(blurred_x, a.train_y, blurred_test_x, a.test_y)
        note = f"Task B: the same images, blurred over {length:.3g} pixels at {ANGLE:g}°."
    of = {PHASE_I: a, "AA": a, "AB": b}
    return Tasks(
        of=of,
        classes=dict.fromkeys(of, len(read.classes)),
        source=read.describe(),
        as_published=read.image_shape == (1, 28, 28),
        notes=(*read.notes, note),
        fingerprint=fingerprint({"A": a, "B": b}),
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
