"""The two phases over Lightning: curves, logs, resume, early stop, precision, what they refuse."""

from __future__ import annotations

import csv
import json
import logging
import math
import random
import signal
import warnings
from functools import partial

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toys import halves, task_of

import racecar
from racecar.baselines import srip
from racecar.demo.experiment import cpu_threads
from racecar.demo.network import fresh_network
from racecar.training import Batches, History, HistoryError, Phase, TrainingError, load_checkpoint, run_phase
from racecar.training.batches import SeededEpochs, mixed


class KilledError(Exception):
    """Stands for a kill: nothing that Lightning does on an ordinary end happens."""


class KillAt(L.Callback):
    """Breaks a run off in the middle of an epoch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise KilledError


class KillAtEnd(L.Callback):
    """Breaks a run off when training is over, before its result is kept."""

    def on_train_end(self, *_):
        raise KilledError


@pytest.fixture
def task(tmp_path):
    return task_of(halves(tmp_path))


@pytest.fixture(autouse=True)
def one_thread():
    with cpu_threads(1):  # as the demo itself: two threads on a busy machine wait for each other
        yield


def network(seed=0, **options):
    chain = fresh_network((1, 6, 6), 2, seed)
    return racecar.wrap(chain, **{"lam": 0.1, "reduction": "mean", **options}) if options else chain


def run(model, task, folder=None, *, epochs=6, **options):
    train = Batches(task.train_x, task.train_y, 16, seed=0)
    validation = Batches(task.test_x, task.test_y, 64)
    options = {"optimizer": partial(torch.optim.Adam, lr=3e-3), "progress": False, "save_every_s": 0.0, **options}
    return run_phase(model, train, validation, epochs=epochs, folder=folder, **options)


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# --- batches


def test_batches_cover_everything_once_in_an_order_of_seed_and_epoch():
    x, y = torch.arange(10.0), torch.arange(10)
    batches = Batches(x, y, 4, seed=3)
    assert len(batches) == 3

    def order(epoch):
        batches.set_epoch(epoch)
        return torch.cat([b for _, b in batches])

    first, second = order(0), order(1)
    assert not torch.equal(first, second) and torch.equal(first, order(0))
    assert first.sort().values.tolist() == list(range(10))
    assert torch.cat([b for _, b in Batches(x, y, 4)]).tolist() == list(range(10))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), torch.zeros(2), 1), "same length, got 3 and 2"),
        ((torch.zeros(0), torch.zeros(0), 1), "x and y are empty"),
        ((torch.zeros(3), torch.zeros(3), 0), "batch_size must be a whole number of at least 1, got 0"),
    ],
)
def test_batches_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        Batches(*arguments)


def test_an_epoch_is_random_by_its_number_alone():
    loader = DataLoader(TensorDataset(torch.arange(8.0)), batch_size=2, shuffle=True)
    batches = SeededEpochs(loader, seed=5)

    def draw(epoch):
        batches.set_epoch(epoch)
        order = torch.cat([x for (x,) in batches])
        return order.tolist(), torch.rand(1).item(), np.random.rand(), random.random()

    first = draw(0)
    torch.rand(7)
    assert draw(0) == first and draw(1) != first and len(batches) == 4
    assert len({mixed(seed, epoch) for seed in range(30) for epoch in range(30)}) == 900


# --- what is computed


@pytest.mark.parametrize("options", [{}, {"variant": "full"}, {"variant": "local", "memory": "deferred"}])
def test_training_learns_is_repeatable_and_quiet(task, tmp_path, capfd, caplog, options):
    state = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()

    def once(folder):
        model = network(**options)
        with warnings.catch_warnings(), caplog.at_level(logging.INFO):
            warnings.simplefilter("error", UserWarning)
            return model, run(model, task, tmp_path / folder, epochs=12)

    model, history = once("a")
    assert history.result("validation/accuracy") == 1.0
    assert history.epochs == 12 and history.seconds > 0 and history.best is None
    assert history.curves["train/task"][-1] < history.curves["train/task"][0]
    layers = [f"train/reverse/{name}" for name in ("0", "3", "5")] if options else []
    assert [name for name in history.curves if name.startswith("train/reverse/")] == layers
    if options:
        total = 0.1 * sum(history.curves[name][3] for name in layers)
        assert history.curves["train/reverse"][3] == pytest.approx(total, rel=1e-5)
    again, same = once("b")
    assert same.curves == history.curves and same_weights(model, again)
    assert torch.equal(torch.random.get_rng_state(), state[0]) and random.getstate() == state[2]
    assert (np.random.get_state()[1] == state[1]).all()
    captured = capfd.readouterr()
    assert captured.out + captured.err == "" and caplog.text == ""


@pytest.mark.parametrize("options", [{"variant": "full"}, {"variant": "local", "memory": "deferred"}])
def test_loss_is_objective_plus_reverse_loss_plus_penalty(task, options):
    model = network(**options)
    generator = torch.Generator().manual_seed(0)
    history = run(model, task, penalty=lambda net: 0.5 * srip(net, generator=generator), epochs=2)
    for loss, *parts in zip(
        *(history.curves[f"train/{name}"] for name in ("loss", "task", "reverse", "penalty")), strict=True
    ):
        assert loss == pytest.approx(sum(parts), rel=1e-5)
    assert "validation/penalty" not in history.curves


def test_wrapped_parts_of_a_larger_model_join_in(task):
    chain = fresh_network((1, 6, 6), 2, 0)
    model = nn.ModuleDict({"a": chain[:5], "b": chain[5:7]})
    racecar.wrap(model["a"], lam=0.1, reduction="mean")
    racecar.wrap(model["b"], lam=0.2, reduction="mean")
    head = nn.Sequential(*chain[7:])

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts, self.head = model, head

        def forward(self, x):
            return self.head(self.parts["b"](self.parts["a"](x)))

    history = run(Whole(), task, epochs=1)
    first = sum(0.1 * history.curves[f"train/reverse/parts.a.{name}"][0] for name in ("0", "3"))
    last = 0.2 * history.curves["train/reverse/parts.b.5"][0]
    assert history.curves["train/reverse"][0] == pytest.approx(first + last, rel=1e-5)


def test_means_weigh_batches_by_their_size():
    x, y = torch.randn(10, 1, 6, 6), torch.tensor([0] * 8 + [1] * 2)
    model = network()
    for parameter in model.parameters():
        parameter.data.zero_()  # says class 0 of everything
    history = run_phase(
        model,
        [(x[:8], y[:8]), (x[8:], y[8:])],
        [(x[:8], y[:8]), (x[8:], y[8:])],
        epochs=1,
        progress=False,
        optimizer=partial(torch.optim.SGD, lr=0.0),
    )
    assert history.curves["validation/accuracy"] == history.curves["train/accuracy"] == [pytest.approx(0.8)]


def test_frozen_and_chosen_parameters_stay_as_they_are(task):
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model[0].weight.requires_grad_(False)
    run(model, task, epochs=1, parameters=[*model[0].parameters(), *model[3].parameters()])
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"0.bias", "3.weight", "3.bias"}


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_precision(task, precision):
    model = network(variant="full")
    history = run(model, task, precision=precision, epochs=8)
    assert history.result("validation/accuracy") > 0.9
    assert all(math.isfinite(v) for curve in history.curves.values() for v in curve)


def test_schedule_is_stepped_every_epoch(task):
    rates = []

    class Watch(L.Callback):
        def on_train_epoch_start(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    run(
        network(),
        task,
        epochs=3,
        scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5),
        callbacks=[Watch()],
    )
    assert rates == pytest.approx([3e-3, 1.5e-3, 0.75e-3])


# --- what is kept


def test_folder_holds_table_events_weights_and_history(task, tmp_path):
    model = network(variant="full")
    history = run(model, task, tmp_path / "run", epochs=3)
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert [float(row["train/reverse/3"]) for row in rows] == history.curves["train/reverse/3"]
    assert History.load(tmp_path / "run" / "history.json") == history
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert [name for name in names if not name.startswith("events")] == [
        "history.json",
        "hparams.yaml",
        "metrics.csv",
        "run.json",
        "weights.safetensors",
    ]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert {"train/loss", "train/reverse/0", "validation/accuracy"} <= set(events.Tags()["scalars"])
    logged = [event.value for event in events.Scalars("train/reverse/5")]
    assert logged == pytest.approx(history.curves["train/reverse/5"], rel=1e-6)
    plain = fresh_network((1, 6, 6), 2, 1)
    load_checkpoint(plain, tmp_path / "run" / "weights.safetensors")
    assert same_weights(plain, model)


@pytest.mark.parametrize("options", [{"variant": "full"}, {"variant": "local", "memory": "deferred"}])
@pytest.mark.parametrize("step", [1, 8])
def test_killed_and_resumed_gives_what_an_unbroken_run_gives(task, tmp_path, step, options):
    rest = {"penalty": lambda net: 0.1 * srip(net), "scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=2)}
    unbroken = network(**options)
    want = run(unbroken, task, tmp_path / "a", **rest)
    with pytest.raises(KilledError):
        run(network(**options), task, tmp_path / "b", callbacks=[KillAt(step)], **rest)
    assert not (tmp_path / "b" / "history.json").exists()
    torch.rand(3)  # what the second process has drawn before does not matter
    broken = network(seed=4, **options) if step == 8 else network(**options)
    history = run(broken, task, tmp_path / "b", resume=True, **rest)
    assert history.curves == want.curves and same_weights(broken, unbroken)
    assert not (tmp_path / "b" / "last.ckpt").exists()


def test_a_finished_run_is_loaded_and_not_run_again(task, tmp_path):
    model = network(variant="full")
    want = run(model, task, tmp_path, epochs=2)
    other = network(seed=3)
    got = run(other, task, tmp_path, epochs=2, resume=True, callbacks=[KillAt(1)])
    assert got == want and same_weights(other, model)
    with pytest.raises(TrainingError, match="holds another run \\(epochs was 2, now 5\\)"):
        run(other, task, tmp_path, epochs=5, resume=True)
    fresh = run(network(seed=3), task, tmp_path, epochs=3)  # without resume: begun anew
    assert fresh.epochs == 3 and len(list(tmp_path.glob("events*"))) == 1


def test_early_stop_keeps_the_best_weights_also_when_resumed(task, tmp_path):
    rest = {"patience": 2, "monitor": "validation/task", "optimizer": partial(torch.optim.SGD, lr=3.0), "epochs": 40}
    unbroken = network()
    want = run(unbroken, task, tmp_path / "a", **rest)
    curve = want.curves["validation/task"]
    assert want.best == curve.index(min(curve)) and want.epochs == want.best + 3 < 40
    assert want.result("validation/task") == min(curve)
    with torch.no_grad():
        loss = nn.functional.cross_entropy(unbroken.eval()(task.test_x), task.test_y)
    assert loss.item() == pytest.approx(min(curve), rel=1e-4)
    for epoch in range(want.epochs + 1):  # killed in every epoch, and when the last one is over
        folder = tmp_path / f"b{epoch}"
        kill = KillAt(3 * epoch + 1) if epoch < want.epochs else KillAtEnd()
        with pytest.raises(KilledError):
            run(network(), task, folder, callbacks=[kill], **rest)
        resumed = network(seed=0 if epoch == 0 else 2)
        got = run(resumed, task, folder, resume=True, **rest)
        assert got.curves == want.curves and got.best == want.best, epoch
        assert same_weights(resumed, unbroken)
        assert run(network(seed=2), task, folder, resume=True, **rest).best == want.best


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"patience": 0}, "patience must be at least 1 epoch, got 0"),
        ({"patience": 2, "folder": None}, "the best weights need a place; give folder="),
        ({"resume": True, "folder": None}, "resume=True needs the folder"),
    ],
)
def test_arguments_that_do_not_go_together(task, tmp_path, options, message):
    folder = options.pop("folder", tmp_path)
    with pytest.raises(TrainingError, match=message):
        run(network(), task, folder, **options)


@pytest.mark.parametrize(
    ("train", "options", "message"),
    [
        ([], {}, "train holds no batch"),
        (iter([1]), {}, "train can be iterated over once only"),
        ([1], {"validation": iter([1])}, "validation can be iterated over once only"),
        ([1], {"devices": 2}, "devices must be 1"),
        ([1], {"patience": 1, "validation": [1], "check_val_every_n_epoch": 2}, "a validation after each"),
    ],
)
def test_data_that_cannot_be_trained_on_are_refused_before_anything_is_written(tmp_path, train, options, message):
    with pytest.raises(TrainingError, match=message):
        run_phase(network(), train, epochs=2, folder=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_objective_without_a_task_is_named(task):
    with pytest.raises(ValueError, match="an objective gives 'task' .*got accuracy"):
        run(network(), task, objective=lambda net, batch: {"accuracy": net(batch[0]).mean()})


def test_a_folder_is_not_continued_by_another_run_nor_emptied_of_others_files(task, tmp_path):
    with pytest.raises(KilledError):
        run(network(), task, tmp_path, callbacks=[KillAt(8)])
    other = {"optimizer": partial(torch.optim.Adam, lr=0.1), "seed": 5}
    with pytest.raises(
        TrainingError, match=r"another run \(seed was 0, now 5; optimiser settings was .*0.003.*now .*0.1"
    ):
        run(network(), task, tmp_path, resume=True, **other)
    with pytest.raises(TrainingError, match="the network has other parameters"):
        run(nn.Sequential(nn.Flatten(), nn.Linear(36, 2)), task, tmp_path, resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "metrics.csv").write_text("mine")
    with pytest.raises(TrainingError, match=r"holds metrics.csv, but no run of this kind"):
        run(network(), task, tmp_path / "mine")


def test_a_damaged_checkpoint_is_as_good_as_none(task, tmp_path):
    want = run(network(), task, epochs=3)
    with pytest.raises(KilledError):
        run(network(), task, tmp_path, epochs=3, callbacks=[KillAt(5)])
    content = (tmp_path / "last.ckpt").read_bytes()
    (tmp_path / "last.ckpt").write_bytes(content[: len(content) // 2])
    assert run(network(), task, tmp_path, epochs=3, resume=True).curves == want.curves


def test_a_network_in_evaluation_mode_is_trained_all_the_same(task):
    model = network(variant="full").eval()
    history = run(model, task, epochs=1)
    assert "train/reverse" in history.curves and model.training


def test_a_loader_with_a_generator_of_its_own_resumes_alike(task, tmp_path):
    data = TensorDataset(task.train_x, task.train_y)

    def once(folder, **options):
        loader = DataLoader(data, 16, shuffle=True, generator=torch.Generator().manual_seed(3))
        options = {"progress": False, "save_every_s": 0.0, **options}
        return run_phase(network(), loader, epochs=4, folder=folder, **options)

    want = once(tmp_path / "a")
    with pytest.raises(KilledError):
        once(tmp_path / "b", callbacks=[KillAt(8)])
    assert once(tmp_path / "b", resume=True).curves == want.curves


def test_training_that_diverges_has_no_best_epoch(task, tmp_path):
    with pytest.raises(TrainingError, match="training diverged: validation/task was not finite in epoch"):
        run(network(), task, tmp_path, patience=2, optimizer=partial(torch.optim.SGD, lr=1e20))


def test_patience_needs_validation_data(task, tmp_path):
    with pytest.raises(TrainingError, match="no validation data to watch"):
        run_phase(network(), [(task.train_x, task.train_y)], epochs=1, patience=1, folder=tmp_path)


def test_an_interrupt_is_passed_on_and_the_handler_put_back(task, tmp_path):
    class Stop(L.Callback):
        def on_train_batch_end(self, *_):
            raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(network(), task, tmp_path, callbacks=[Stop()])
    assert signal.getsignal(signal.SIGINT) is handler


def test_histories(tmp_path):
    history = History()
    history.add({"a": 1.0})
    history.add({"a": 2.0, "b": 3.0})
    assert history.curves == {"a": [1.0, 2.0], "b": [None, 3.0]} and history.values("b") == [3.0]
    assert history.result("b") == 3.0 and history.values("c") == []
    with pytest.raises(KeyError, match="no curve 'c'; there are a, b"):
        history.result("c")
    path = tmp_path / "history.json"
    with pytest.raises(HistoryError, match="not a readable history"):
        History.load(path)
    history.save(path)
    assert History.load(path) == history
    path.write_text(json.dumps({"format": 9}))
    with pytest.raises(HistoryError, match="format 9; this version reads format 1"):
        History.load(path)
    path.write_text("{")
    with pytest.raises(HistoryError, match="not a readable history"):
        History.load(path)


def test_phase_is_a_module_for_a_trainer_of_ones_own(task):
    phase = Phase(network(variant="full"))
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(phase, Batches(task.train_x, task.train_y, 16, seed=0))
    assert phase.history.epochs == 1 and "train/reverse" in trainer.callback_metrics
