"""Small image data that every test of the demo and of training can learn in a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from racecar.data import load_images
from racecar.demo.settings import Settings
from racecar.experiments.tasks import Task


def halves(folder: Path, count: int = 60, side: int = 6, channels: int = 1) -> Path:
    """Writes images of two classes that differ in where the light is: above or below."""
    rng = np.random.default_rng(0)
    y = np.arange(count) % 2
    x = rng.uniform(0, 0.3, (count, side, side, channels))
    x[y == 0, : side // 2] += 0.6
    x[y == 1, side // 2 :] += 0.6
    path = folder / "halves.npz"
    np.savez(path, x=x, y=y)
    return path


def task_of(path: Path) -> Task:
    """The images of a file as one task."""
    data = load_images(path)
    return Task(data.train_x, data.train_y, data.test_x, data.test_y)


TINY = dict(quick=True, labels=10, batch_size=16, models="Pre,RR", transfer_epochs=3)


def tiny(folder: Path, **options) -> Settings:
    """Settings of a demo that takes a second."""
    return Settings(data=str(halves(folder)), **{**TINY, "workers": 1, **options})


def same_runs(results, others) -> bool:
    """Equal but for the time they took."""

    def facts(run):
        return {**vars(run), "seconds": 0}

    return list(map(facts, results.runs)) == list(map(facts, others.runs))
