"""A model's forward as a graph of calls, whoever found it: `record.py` while it ran, `trace.py` without running it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from . import calls
from .calls import Family

NO_PARAMETER = "its weight is no parameter: it is computed in the forward, or a buffer"
NOT_OF_THE_INPUT = "does not work on what comes from the input"


@dataclass
class Call:
    """One call of a forward.

    Attributes:
        name: what to call it in messages: the path of a tied operation's module or weight; else the function.
        family: how it is treated.
        inputs: places in `Network.calls` of what it reads, the first argument first; -1 is the model's input.
        module: describes it; None for OTHER, and where `reason` says what is wrong.
        reason: why it cannot be run backwards although it belongs to a family.
        consumers: places of the calls that read what it gives; `Network.OUTPUT` for what the forward returns.
        hidden: the result is seen by nobody but the function that it is a part of.
        opaque: it calls functions of its own that a run sees, and this network does not.
        owner: of a tied operation, the module that has its weight, and under which name.
    """

    name: str
    family: Family
    inputs: tuple[int, ...]
    module: nn.Module | None = None
    reason: str | None = None
    consumers: list[int] = field(default_factory=list)
    hidden: bool = False
    opaque: bool = False
    owner: tuple[nn.Module, str] | None = None

    @property
    def kind(self) -> str:
        """Which norm, activation or pooling it is; its family's name for what is neither."""
        if self.module is None or self.family not in (Family.LATENT, Family.PRE):
            return self.family.value
        return calls.kind_of_module(self.module)


@dataclass
class Network:
    """The calls of one forward in the order in which they ran.

    `readers`: who reads the model's input; `traced`: found without running the model;
    `whole`: paths of the modules that are called themselves, not only what is in them.
    """

    calls: list[Call] = field(default_factory=list)
    readers: list[int] = field(default_factory=list)
    traced: bool = False
    whole: set[str] = field(default_factory=set)

    INPUT, OUTPUT = -1, -2

    def add(self, call: Call) -> int:
        """Appends a call, and itself to the consumers of what it reads. Returns its place."""
        place = len(self.calls)
        self.calls.append(call)
        for source in dict.fromkeys(call.inputs):
            self.consumers(source).append(place)
        return place

    def consumers(self, place: int) -> list[int]:
        """Who reads the result of a call, or the model's input."""
        return self.readers if place == self.INPUT else self.calls[place].consumers
