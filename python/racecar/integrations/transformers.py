"""The reverse pass in `transformers.Trainer`, by a mixin.

from transformers import Trainer
from racecar.integrations.transformers import ReverseTrainerMixin

class ReverseTrainer(ReverseTrainerMixin, Trainer):
    pass

racecar.wrap(model.features, lam=1e-5)
ReverseTrainer(model, args, train_dataset=data, lam_schedule=warmup(500)).train()
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "transformers":
        raise
    raise ModuleNotFoundError(
        "racecar.integrations.transformers needs transformers: pip install 'transformers[torch]'", name="transformers"
    ) from error

from ..schedules import LamSchedule
from ..wrapping import wrapped_parts


class LamCallback(TrainerCallback):
    """Sets λ before every optimiser step, by the trainer's own count of them, which its checkpoints keep.

    Args:
        schedule: for the model that the trainer trains.
    """

    def __init__(self, schedule: LamSchedule) -> None:
        self.schedule = schedule

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """λ of the step that begins."""
        self.schedule.set(state.global_step)


class ReverseTrainerMixin:
    """Before `transformers.Trainer` among a class's bases: adds the reverse loss of every wrapped part to the loss.

    Evaluation is untouched. Logs gain `reverse_loss` (Σ λ_m · loss_m) and `reverse/NAME` of every layer (without λ) of
    the last step. `Trainer` may divide a step's loss by the number of accumulation steps, the reverse loss with it: for
    accumulated gradients choose reduction="mean", or a λ for `l2` and `sum` that is so many times larger.

    Args:
        lam_schedule: step -> factor of λ, for example `racecar.schedules.warmup(500)`. The others are `Trainer`'s.

    Raises:
        ValueError: no part of the model is wrapped.
    """

    model: nn.Module
    add_callback: Callable[[Any], None]

    def __init__(self, *args: Any, lam_schedule: Callable[[int], float] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not wrapped_parts(self.model):
            raise ValueError(
                f"no part of this {type(self.model).__name__} is wrapped; call racecar.wrap on it before the trainer "
                "is made"
            )
        if lam_schedule is not None:
            self.add_callback(LamCallback(LamSchedule(self.model, lam_schedule)))

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The trainer's own loss, plus the reverse loss while training."""
        own: Any = super()
        loss, outputs = own.compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            for part in wrapped_parts(model).values():
                loss = loss + part.reverse_loss
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's own log, with the reverse losses of the last training step beside its loss."""
        if "loss" in logs:
            logs = {**logs, **_numbers(wrapped_parts(self.model))}
        own: Any = super()
        own.log(logs, *args, **kwargs)


def _numbers(parts: dict[str, Any]) -> dict[str, float]:
    """Reads the losses once per log, since a GPU has to be waited for."""
    known = {where: part for where, part in parts.items() if part.reverse_losses}
    found = {f"reverse/{where}{name}": v for where, p in known.items() for name, v in p.reverse_losses.items()}
    total: list[Tensor] = [part.reverse_loss.detach() for part in known.values()]
    return {name: value.item() for name, value in found.items()} | (
        {"reverse_loss": sum(value.item() for value in total)} if total else {}
    )
