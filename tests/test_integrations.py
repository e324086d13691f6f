"""The reverse pass in other people's trainers gives what a loop of one's own gives."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import racecar
from racecar.schedules import linear

STEPS, LAM = 4, 0.2


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, labels: Tensor | None = None):
        out = self.head(self.features(x))
        return out if labels is None else {"loss": nn.functional.cross_entropy(out, labels), "logits": out}


def batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(3, 6), torch.tensor([0, 1, 0])) for _ in range(STEPS)]


def by_hand(steps: int = STEPS) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State and last reverse losses of a loop of one's own, with a λ that falls."""
    model = Network()
    net = racecar.wrap(model.features, LAM)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for step, (x, y) in enumerate(batches()[:steps]):
        net.lam = LAM * linear(8)(step)
        optimizer.zero_grad()
        (model(x, y)["loss"] + net.reverse_loss).backward()
        optimizer.step()
    return model.state_dict(), {"reverse": net.reverse_loss.detach(), **net.reverse_losses}


# ------------------------------------------------------------------------------------------- Lightning


@pytest.fixture
def lightning():
    pytest.importorskip("lightning", reason="Lightning is not installed")
    import lightning.pytorch as L

    class Module(L.LightningModule):
        def __init__(self, returns: str = "loss") -> None:
            super().__init__()
            self.model, self.returns = Network(), returns
            self.save_hyperparameters()

        def training_step(self, batch):
            loss = self.model(*batch)["loss"]
            if self.returns == "error":
                raise OverflowError("in a step")
            return {"loss": loss, "dict": {"loss": loss}, "nothing": None}[self.returns]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    def fit(module, folder, *callbacks, steps=STEPS, **more):
        trainer = L.Trainer(
            max_steps=steps,
            callbacks=[*callbacks],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(module, DataLoader(batches(), batch_size=None), **more)
        return trainer

    return Module, fit


def is_plain(module) -> bool:
    return type(module.model.features) is nn.Sequential and "training_step" not in module.__dict__


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("memory", ["store", "deferred"])
@pytest.mark.parametrize("returns", ["loss", "dict"])
def test_lightning_trains_as_a_loop_does(lightning, tmp_path, returns: str, memory: str) -> None:
    from racecar.integrations.lightning import ReversePass

    module_of, fit = lightning
    module = module_of(returns)
    variant = "local" if memory == "deferred" else "auto"
    lam_seen = ReversePass("model.features", LAM, schedule=linear(8), variant=variant, memory=memory)
    trainer = fit(module, tmp_path, lam_seen)
    assert is_plain(module)
    logged = {name.removeprefix("reverse/"): value for name, value in trainer.logged_metrics.items()}
    if memory == "store":
        want, losses = by_hand()
        torch.testing.assert_close(dict(module.model.state_dict()), dict(want))
        torch.testing.assert_close(logged, losses)
    assert set(logged) == {"reverse", "0", "2"} and all(value > 0 for value in logged.values())


@pytest.mark.filterwarnings("ignore")
def test_lightning_goes_on_with_the_lambda_of_the_step(lightning, tmp_path) -> None:
    from racecar.integrations.lightning import ReversePass

    module_of, fit = lightning
    first = fit(module_of(), tmp_path, ReversePass("model.features", LAM, schedule=linear(8)), steps=2)
    first.save_checkpoint(tmp_path / "half.ckpt")

    class Rest(ReversePass):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            seen.append(self.net.lam[0])

    seen: list[float] = []
    module = module_of()
    fit(module, tmp_path, Rest("model.features", LAM, schedule=linear(8)), ckpt_path=tmp_path / "half.ckpt")
    assert seen == pytest.approx([LAM * 0.75, LAM * 0.625])
    assert is_plain(module)


@pytest.mark.filterwarnings("ignore")
def test_lightning_says_what_is_wrong(lightning, tmp_path) -> None:
    from racecar.integrations.lightning import ReversePass

    module_of, fit = lightning
    with pytest.raises(ValueError, match="Module has no part 'features'.*it consists of model"):
        fit(module_of(), tmp_path, ReversePass("features", LAM))
    module = module_of()
    racecar.wrap(module.model.features, 0.1)
    with pytest.raises(ValueError, match="wrapped already"):
        fit(module, tmp_path, ReversePass("model.features", LAM))
    module = module_of("nothing")
    with pytest.raises(TypeError, match="training_step must return the loss.*got NoneType"):
        fit(module, tmp_path, ReversePass("model.features", LAM))
    assert is_plain(module)
    module = module_of("error")
    with pytest.raises(OverflowError):
        fit(module, tmp_path, ReversePass("model.features", LAM))
    assert is_plain(module)


# ------------------------------------------------------------------------------------------- transformers


@pytest.fixture
def trainer_of(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from transformers import Trainer, TrainingArguments

    from racecar.integrations.transformers import ReverseTrainerMixin

    class ReverseTrainer(ReverseTrainerMixin, Trainer):
        def _get_train_sampler(self, *args):
            return None  # the batches' own order

    def make(model, **more):
        settings = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=3,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_steps=2,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            max_steps=more.pop("max_steps", STEPS),
        )
        data = [{"x": x[i], "labels": y[i]} for x, y in batches() for i in range(3)]
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        return ReverseTrainer(model, settings, train_dataset=data, optimizers=(optimizer, None), **more)

    return make


def test_transformers_trains_as_a_loop_does(trainer_of) -> None:
    want, losses = by_hand()
    model = Network()
    racecar.wrap(model.features, LAM)
    trainer = trainer_of(model, lam_schedule=linear(8))
    trainer.train()
    torch.testing.assert_close(dict(model.state_dict()), dict(want))
    last = [line for line in trainer.state.log_history if "reverse_loss" in line][-1]
    assert last["reverse_loss"] == pytest.approx(losses["reverse"].item())
    assert last["reverse/features.0"] == pytest.approx(losses["0"].item())
    model.eval()
    x, y = batches()[0]
    torch.testing.assert_close(trainer.compute_loss(model, {"x": x, "labels": y}), model(x, y)["loss"])


def test_transformers_goes_on_with_the_lambda_of_the_step(trainer_of) -> None:
    model = Network()
    racecar.wrap(model.features, LAM)
    trainer_of(model, lam_schedule=linear(8), max_steps=2).train()
    model = Network()
    net = racecar.wrap(model.features, LAM)
    trainer_of(model, lam_schedule=linear(8)).train(resume_from_checkpoint=True)
    torch.testing.assert_close(dict(model.state_dict()), dict(by_hand()[0]))
    assert net.lam[0] == pytest.approx(LAM * 0.625)


def test_transformers_says_that_nothing_is_wrapped(trainer_of) -> None:
    with pytest.raises(ValueError, match="no part of this Network is wrapped"):
        trainer_of(Network())


# ------------------------------------------------------------------------------------------- what is not there


@pytest.mark.parametrize(
    ("module", "missing", "says"),
    [
        ("lightning", ["lightning", "lightning.pytorch", "pytorch_lightning"], "pip install lightning"),
        ("transformers", ["transformers"], r"pip install 'transformers\[torch\]'"),
    ],
)
def test_a_missing_trainer_is_named(monkeypatch, module: str, missing: list[str], says: str) -> None:
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"racecar.integrations.{module}", raising=False)
    with pytest.raises(ModuleNotFoundError, match=f"racecar.integrations.{module} needs .*{says}"):
        importlib.import_module(f"racecar.integrations.{module}")
