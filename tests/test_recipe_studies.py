"""The recipes on images: what they train, how they go on, what they say of bad data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_cifar_files import write as cifar_files_of
from torch import nn

from racecar.data import DataError
from racecar.data.cifar import KINDS
from racecar.experiments.contestants import SCRATCH, STD_FOR_LONG
from racecar.experiments.folder import SettingsError
from racecar.recipes import mnist
from racecar.recipes.folder import RunFolder
from racecar.recipes.listener import Listener
from racecar.recipes.picture_sets import part_of
from racecar.recipes.registry import RECIPES
from racecar.recipes.study import PHASE_I, Settings, Site, jobs_of
from racecar.recipes.study_results import draw, run_study

STUDIES = ("mnist", "cifar", "resnet110", "texture-shape")


def quick(name: str, **given) -> Settings:
    return RECIPES[name].settings("quick", **{"seeds": 1, "workers": 1, "accelerator": "cpu", **given})


def started(name: str, out: Path, **given):
    options = {"data": None, "command": "racecar run", "resume": False, "overwrite": False, "listener": None}
    settings = given.pop("settings", None) or quick(name)
    return RECIPES[name].run(settings, RunFolder(out, name), **{**options, **given})


def class_folders(folder: Path, names: list[str], count: int, side: int = 16) -> Path:
    """Random images, one folder for every class."""
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.mark.parametrize("name", STUDIES)
def test_quick(name: str, tmp_path: Path) -> None:
    content = started(name, tmp_path)
    study = import_module(f"racecar.recipes.{name.replace('-', '_')}").STUDY
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["accuracy"] == content["accuracy"]
    assert list(content["accuracy"]) == [contestant.name for contestant in study.models]
    for contestant in study.models:
        wanted = {study.columns[leg.name] for leg in study.legs if contestant.pretrained or leg.name in study.scratch}
        wanted -= {"A"} if contestant.greedy else set()
        assert set(content["accuracy"][contestant.name]) == wanted
    assert (tmp_path / "curves.png").stat().st_size > 5000
    table = (tmp_path / "table.md").read_text()
    assert all(f"| {contestant.name} |" in table for contestant in study.models)
    assert content["paper"] == {}, "the digits are not the paper's data"
    assert "stand in" in table or name == "mnist"


def test_the_figure_names_a_model_of_one_panel_only() -> None:
    curves = {"A": {"Std": [[0.1, 0.2]]}, "AB": {"Std": [[0.1, 0.2]], "from scratch": [[0.1, 0.3]]}}
    (legend,) = draw(curves).legends
    assert [text.get_text() for text in legend.get_texts()] == ["Std", "from scratch"]


def test_interrupted_and_resumed_gives_the_same(tmp_path: Path) -> None:
    whole = started("mnist", tmp_path / "whole")
    steps = 0

    def advance(count: int) -> None:
        nonlocal steps
        steps += count
        if steps > 20:
            raise KeyboardInterrupt

    settings = quick("mnist", save_every_s=0.0)
    with pytest.raises(KeyboardInterrupt):
        started("mnist", tmp_path / "parts", settings=settings, listener=Listener(advance=advance))
    state = torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)
    # the same number of epochs for "Std, same time" as the whole run had: the clock is no part of this test
    other = torch.load(tmp_path / "whole" / "checkpoint.pt", weights_only=True)
    assert round(2 * state["slower"]["RR"]) >= 2
    told: list[tuple[int, int]] = []
    resumed = started(
        "mnist", tmp_path / "parts", settings=settings, resume=True,
        listener=Listener(plan=lambda steps, done: told.append((steps, done))),
    )  # fmt: skip
    assert told[0][1] > 0
    same = set(whole["accuracy"]) - ({STD_FOR_LONG.name} if state["slower"] != other["slower"] else set())
    assert {name: resumed["accuracy"][name] for name in same} == {name: whole["accuracy"][name] for name in same}
    assert resumed["step time over Std's"] == state["slower"], "measured once, kept for the resumed run"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    settings = quick("mnist", seeds=2)
    return Site(mnist.STUDY, settings, mnist.tasks(settings, None), tmp_path, {"RR": 2.5})


def test_who_trains_what(site: Site) -> None:
    jobs = {(job.contestant.name, job.seed): job for job in jobs_of(site)}
    scratch, long = jobs[SCRATCH.name, 0], jobs[STD_FOR_LONG.name, 0]
    assert [(leg.name, leg.start) for leg in scratch.legs] == [("AB", None)]
    assert site.epochs(PHASE_I, long.contestant) == round(2.5 * site.epochs(PHASE_I, jobs["Std", 0].contestant))
    assert site.epochs("AB", long.contestant) == site.epochs("AB", jobs["Std", 0].contestant)
    first, second = (site.batches(leg, 0)[0] for leg in (PHASE_I, "AA"))
    assert not torch.equal(next(iter(first))[1], next(iter(second))[1]), "every leg has an order of its own"


def test_weights_begin_alike_for_every_contestant(site: Site) -> None:
    a, b = site.network(1, PHASE_I), site.network(1, "AB")
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(next(a.parameters()), next(site.network(0, PHASE_I).parameters()))
    assert site.onward(a, 1, "AB") is a


def test_other_classes_get_a_fresh_head(tmp_path: Path) -> None:
    cifar = import_module("racecar.recipes.cifar")
    data = class_folders(tmp_path / "images", list("abcde"), 6)
    settings = quick("cifar", limit=0, test_limit=0)
    tasks = cifar.tasks(settings, data)
    assert tasks.classes == {PHASE_I: 3, "AA": 3, "AB": 2}
    assert set(tasks.of["AB"].train_y.tolist()) == {0, 1}
    assert any("a, b, c; B is d, e" in note for note in tasks.notes)
    site = Site(cifar.STUDY, settings, tasks, tmp_path)
    network = site.network(0, PHASE_I)
    kept = [p.clone() for p in network.parameters()][:-2]
    onward = site.onward(network, 0, "AB")
    assert isinstance(onward[-1], nn.Linear)
    assert onward[-1].out_features == 2
    assert all(torch.equal(x, y) for x, y in zip(kept, list(onward.parameters())[:-2], strict=True))


def test_a_part_of_the_classes(site: Site) -> None:
    part = part_of(site.tasks.of[PHASE_I], [7, 2])
    whole = site.tasks.of[PHASE_I]
    assert torch.equal(part.train_x[part.train_y == 0], whole.train_x[whole.train_y == 7])
    assert torch.equal(part.test_x[part.test_y == 1], whole.test_x[whole.test_y == 2])
    with pytest.raises(DataError, match="at least two"):
        part_of(whole, [1])


def test_edges_and_silhouettes(tmp_path: Path) -> None:
    module = import_module("racecar.recipes.texture_shape")
    class_folders(tmp_path / "stylized", ["bear", "car"], 16)
    class_folders(tmp_path / "edges", ["bear", "car"], 3)
    settings = quick("texture-shape", limit=0, test_limit=0)
    tasks = module.tasks(settings, tmp_path)
    assert len(tasks.of[PHASE_I].test_y) == 4, "an eighth"
    assert any("not beside the data: filled" in note for note in tasks.notes)
    leg, x, y = tasks.further["edges"]
    assert (leg, x.shape, sorted(y.tolist())) == ("AA", (6, 3, 16, 16), [0, 0, 0, 1, 1, 1])
    content = started("texture-shape", tmp_path / "out", settings=settings, data=tmp_path)
    assert len(content["accuracy"]["RR"]["edges"]) == 1
    assert "edges here" in (tmp_path / "out" / "table.md").read_text()
    (tmp_path / "edges" / "car").rename(tmp_path / "edges" / "cart")
    with pytest.raises(DataError, match="in one of the two only: car, cart"):
        module.tasks(settings, tmp_path)


def test_newer_photographs(tmp_path: Path) -> None:
    module = import_module("racecar.recipes.resnet110")
    class_folders(tmp_path / "train", list("abcdefghij"), 3, side=32)
    class_folders(tmp_path / "test", list("abcdefghij"), 2, side=32)
    np.save(tmp_path / "cifar10.1_v6_data.npy", np.random.default_rng(0).integers(0, 256, (2000, 32, 32, 3), np.uint8))
    np.save(tmp_path / "cifar10.1_v6_labels.npy", np.arange(2000) % 10)
    settings = quick("resnet110", limit=0, test_limit=0)
    leg, x, y = module.tasks(settings, tmp_path).further["CIFAR-10.1"]
    assert (leg, x.shape, y.shape) == (PHASE_I, (2000, 3, 32, 32), (2000,))
    for half in ("train", "test"):
        shutil.rmtree(tmp_path / half / "j")
    with pytest.raises(DataError, match="of 10 classes; the data beside it have 9"):
        module.tasks(settings, tmp_path)


def test_the_schedule_of_the_residual_network() -> None:
    factor = import_module("racecar.recipes.resnet110").factor
    assert [factor(8, epoch) for epoch in range(8)] == [0.1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]
    assert factor(2, 0) == 1


def test_validation_looks_at_no_test_image(site: Site) -> None:
    held = site.tasks.validated()
    task, whole = held.of[PHASE_I], site.tasks.of[PHASE_I]
    assert len(task.train_y) + len(task.test_y) == len(whole.train_y)
    assert held.of["AA"] is task
    rows = {tuple(image.flatten().tolist()) for image in whole.train_x}
    assert all(tuple(image.flatten().tolist()) in rows for image in task.test_x)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"lam": float("nan")}, "lam must be a number"),
        ({"input_activation": "gelu"}, "relu, tanh or empty, got 'gelu'"),
        ({"accelerator": "tpu"}, "cpu, gpu or auto"),
    ],
)
def test_bad_settings(wrong: dict, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        quick("mnist", **wrong)


@pytest.mark.parametrize("name", STUDIES)
def test_bad_data(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        started(name, tmp_path / "out", data=tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_folders_of_other_runs(tmp_path: Path) -> None:
    started("mnist", tmp_path)
    with pytest.raises(SettingsError, match="holds a run that is finished"):
        started("mnist", tmp_path)
    with pytest.raises(SettingsError, match="a run of the recipe 'mnist', not of 'cifar'"):
        started("cifar", tmp_path)
    with pytest.raises(SettingsError, match="lam was 1.0, now 0.5"):
        started("mnist", tmp_path, settings=replace(quick("mnist"), lam=0.5), resume=True)
    before = (tmp_path / "results.json").read_text()
    started("mnist", tmp_path, resume=True)
    assert json.loads((tmp_path / "results.json").read_text())["accuracy"] == json.loads(before)["accuracy"]


def test_a_full_disk_keeps_what_was_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import racecar.recipes.study_results as module

    original: Callable = module.replace_text
    monkeypatch.setattr(module, "replace_text", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        started("mnist", tmp_path)
    monkeypatch.setattr(module, "replace_text", original)
    told: list[tuple[int, int]] = []
    listener = Listener(plan=lambda steps, done: told.append((steps, done)))
    run_study(
        mnist.STUDY, quick("mnist"), RunFolder(tmp_path, "mnist"), data=None, command="", resume=True,
        overwrite=False, listener=listener,
    )  # fmt: skip
    assert told[0][0] == told[0][1], "all legs were finished"


def test_outlines_are_not_parted_by_validation(tmp_path: Path) -> None:
    module = import_module("racecar.recipes.texture_shape")
    for name in ("bear", "car"):
        class_folders(tmp_path / "all", [name], 0)
        for i in range(48):
            pixels = np.full((16, 16, 3), 30 * (i % 8) + 5, np.uint8)  # the grey level is the outline
            Image.fromarray(pixels).save(tmp_path / "all" / name / f"{name}{i % 8}-dog{i}.png")
    settings = quick("texture-shape", limit=0, test_limit=0)
    tasks = module.tasks(settings, tmp_path / "all")
    held = tasks.validated().of[PHASE_I]

    def outlines(x: torch.Tensor, y: torch.Tensor) -> set[tuple[float, int]]:
        return {(round(float(image.mean()), 3), int(label)) for image, label in zip(x, y, strict=True)}

    whole = tasks.of[PHASE_I]
    parts = [outlines(held.train_x, held.train_y), outlines(held.test_x, held.test_y)]
    parts.append(outlines(whole.test_x, whole.test_y))
    assert [len(part) for part in parts] == [12, 2, 2]
    assert len(set.union(*parts)) == 16, "no outline is in two parts"


def test_cifar_100_beside_cifar_10(tmp_path: Path) -> None:
    module = import_module("racecar.recipes.cifar")
    hundred = cifar_files_of(next(kind for kind in KINDS if kind.folder == "cifar-100-binary"), tmp_path)
    with pytest.raises(DataError, match="holds CIFAR-100, which is task B, but not CIFAR-10"):
        module.tasks(quick("cifar"), tmp_path)
    cifar_files_of(next(kind for kind in KINDS if kind.folder == "cifar-10-batches-py"), tmp_path)
    tasks = module.tasks(quick("cifar", limit=0, test_limit=0), tmp_path)
    assert (tasks.classes["AA"], tasks.classes["AB"]) == (10, 100)
    assert any("Task B: CIFAR-100" in note for note in tasks.notes)
    assert len(module.tasks(quick("cifar", limit=40), tmp_path).of["AB"].train_y) == 100  # one of every class at least
    (hundred / "test.bin").unlink()
    with pytest.raises(DataError, match=r"holds no test.bin of CIFAR-100"):
        module.tasks(quick("cifar"), tmp_path)


def test_grey_images_and_other_sizes(tmp_path: Path) -> None:
    module = import_module("racecar.recipes.cifar")
    x = np.zeros((40, 32, 32), np.uint8)
    np.savez(tmp_path / "grey.npz", x=x, y=np.arange(40) % 4)
    tasks = module.tasks(quick("cifar", limit=0, test_limit=0), tmp_path / "grey.npz")
    assert tasks.of[PHASE_I].train_x.shape[1:] == (3, 32, 32)
    assert "Grey images became colour." in tasks.notes
    np.savez(tmp_path / "small.npz", x=x[:, :28, :28], y=np.arange(40) % 4)
    for name in ("cifar", "resnet110"):
        with pytest.raises(DataError, match="takes images of 32×32, got 28×28"):
            started(name, tmp_path / "out", data=tmp_path / "small.npz")
    assert not (tmp_path / "out").exists()


def test_too_few_classes_to_share_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 3 classes; at least 4 are needed"):
        started("cifar", tmp_path / "out", data=class_folders(tmp_path / "images", list("abc"), 6))
