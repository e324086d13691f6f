"""What a training step costs: bytes kept for the backward pass, peak bytes, and seconds.

One place for every figure that the benchmarks, the demo and the tests report, so that they mean the same:

* **kept**: bytes alive between the forward and the backward pass because of it, whatever holds them;
* **peak**: high-water mark of everything that one step allocates;
* **time**: contestants alternate in one process, and ratios are taken round by round, so that a machine which slows
  down for a second slows down both sides of a ratio.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

__all__ = ["Kept", "Spread", "Timing", "kept_bytes", "kept_storages", "peak_bytes", "ratios", "step_times"]


def kept_bytes(run: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes that one forward pass keeps alive for its backward pass.

    The union of two sets of storages, each storage counted once and in whole: those that autograd saves (an input that
    existed before counts too), and those that `run` allocated and that are still alive when it returns, whoever holds
    them (a node's attribute, a closure, a module). The returned tensor itself counts only where autograd saved it.

    Args:
        run: one forward pass; returns the loss. It is called once, and the loss is dropped without a backward pass.
        parameters: tensors that do not count, usually `model.parameters()`.

    Returns:
        Bytes. On CUDA run one step beforehand: libraries allocate their workspaces at the first call and keep them.
    """
    return sum(kept.size for kept in kept_storages(run, parameters))


@dataclass(frozen=True)
class Kept:
    """One storage that is kept for the backward pass.

    Attributes:
        size: its bytes.
        tensors: detached views of it: what autograd saved, and what Python holds. Empty where only compiled code does.
    """

    size: int
    tensors: tuple[Tensor, ...]


def kept_storages(run: Callable[[], Tensor], parameters: Iterable[Tensor]) -> list[Kept]:
    """What `kept_bytes` counts, storage by storage, to find out what each of them is.

    Args, Returns: as `kept_bytes`; the tensors of the result keep their memory alive.
    """
    owned = {_address(p) for p in parameters}
    saved: dict[int, list[Tensor]] = {}  # holding a tensor keeps its storage's address from being reused

    def pack(tensor: Tensor) -> Tensor:
        plain = tensor.detach()  # a saved result that held its own graph would never be released
        if _address(tensor) not in owned:
            saved.setdefault(_address(tensor), []).append(plain)
        return plain

    with _memory_profile() as prof, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = run()
    kept = {address: size for address, size in _alive(prof).items() if address not in owned}
    kept.pop(_address(loss), None)
    kept.update({address: tensors[0].untyped_storage().nbytes() for address, tensors in saved.items()})
    held = _held_in_python(kept.keys() - saved.keys())
    del loss
    return [Kept(size, (*saved.get(address, ()), *held.get(address, ()))) for address, size in kept.items()]


def _held_in_python(addresses: AbstractSet[int]) -> dict[int, list[Tensor]]:
    """Tensors of these storages that some object of Python refers to, such as what a checkpoint computes again from."""
    found: dict[int, list[Tensor]] = {}
    if not addresses:
        return found
    for candidate in gc.get_objects():
        if type(candidate) in (Tensor, torch.nn.Parameter):
            tensor = candidate.detach()
            if tensor.layout == torch.strided and tensor.device.type != "meta" and _address(tensor) in addresses:
                found.setdefault(_address(tensor), []).append(tensor)
    return found


def peak_bytes(step: Callable[[], object], *, device: torch.device | str = "cpu") -> int:
    """High-water mark of what one training step allocates, above what is allocated when it starts.

    Args:
        step: one whole step (forward and backward pass, optimiser if wanted). It is called twice: the first call, not
            measured, lets gradients and optimiser state come into being.
        device: where the step runs. CPU: memory events of PyTorch's profiler. CUDA: `torch.cuda.max_memory_allocated`.

    Returns:
        Bytes.
    """
    step()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _memory_profile() as prof:
        step()
    # What was there before does not count when it goes: its size is unknown, or was noted in an earlier profile.
    own: dict[int, int] = {}
    now = top = 0
    for address, change in _memory_events(prof):
        if change > 0:
            own[address] = change
            now += change
            top = max(top, now)
        else:
            now -= own.pop(address, 0)
    return top


@dataclass(frozen=True)
class Spread:
    """Samples and where their middle lies; a ratio has no unit, a `Timing` is in seconds."""

    samples: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError("at least one sample is needed, got none")

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def p20(self) -> float:
        """20th percentile."""
        return _percentile(self.samples, 0.2)

    @property
    def p80(self) -> float:
        """80th percentile."""
        return _percentile(self.samples, 0.8)


@dataclass(frozen=True)
class Timing(Spread):
    """Seconds of one step, one sample per round, in the order of the rounds."""

    def ratio_to(self, base: Timing) -> Spread:
        """Round by round how many times `base`'s time this took; `.median` is the figure to report.

        Raises:
            ValueError: the two were not measured in the same rounds.
        """
        if len(self.samples) != len(base.samples):
            raise ValueError(
                f"ratios pair the samples of the same round: {len(self.samples)} rounds cannot be held against "
                f"{len(base.samples)}; measure both in one call of step_times"
            )
        return Spread(tuple(a / b for a, b in zip(self.samples, base.samples, strict=True)))


def step_times(
    steps: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 20,
    warmup: int = 3,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> dict[str, Timing]:
    """Times several steps against each other, in this process, one sample of each per round.

    Every second round runs backwards through `steps`, so that none always follows the same neighbour. On CUDA each
    sample is wall-clock time between two synchronisations: launch overhead counts, as it does in training.

    Args:
        steps: name -> one training step.
        rounds: samples per step.
        warmup: untimed calls of each step before the first round.
        device: where the steps run.
        progress: called with the number of finished rounds after each of them.

    Returns:
        name -> `Timing` in seconds.

    Raises:
        ValueError: no steps, fewer than one round, or a negative number of warm-up calls.
    """
    if not steps or rounds < 1 or warmup < 0:
        raise ValueError(
            f"step_times needs at least one step, one round and warmup >= 0, "
            f"got {len(steps)} steps, rounds={rounds}, warmup={warmup}"
        )
    on_cuda = torch.device(device).type == "cuda"

    def seconds(step: Callable[[], object]) -> float:
        if on_cuda:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        step()
        if on_cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for step in steps.values():
        for _ in range(warmup):
            step()
    samples: dict[str, list[float]] = {name: [] for name in steps}
    with _no_garbage_collection():
        for done in range(rounds):
            for name in list(steps) if done % 2 == 0 else list(steps)[::-1]:
                samples[name].append(seconds(steps[name]))
            if progress is not None:
                progress(done + 1)
    return {name: Timing(tuple(taken)) for name, taken in samples.items()}


def ratios(times: Mapping[str, Timing], base: str) -> dict[str, Spread]:
    """Every timing as a ratio to the one named `base`: medians over rounds of the ratio within a round.

    Raises:
        ValueError: `base` is not among `times`.
    """
    if base not in times:
        raise ValueError(f"no timing is named {base!r}; there are {', '.join(map(repr, times))}")
    return {name: timing.ratio_to(times[base]) for name, timing in times.items()}


def _percentile(samples: Iterable[float], share: float) -> float:
    """Linear interpolation between order statistics, as in numpy's default."""
    ordered = sorted(samples)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _memory_profile() -> profile:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read at the first profile: two lines per profile on stderr else
    # The CPU activity alone: with profile_memory it records the allocations of every device.
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)


def _memory_events(prof: profile) -> list[tuple[int, int]]:
    """(address, bytes gained or lost) of every allocation and release, in order of time."""
    found: list[tuple[int, int, int]] = []
    pending = list(prof.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.tag == torch._C._profiler._EventType.Allocation:
            fields = event.extra_fields
            found.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    return [(address, change) for _, address, change in sorted(found, key=lambda entry: entry[0])]


def _alive(prof: profile) -> dict[int, int]:
    """address -> bytes of what was allocated while `prof` recorded and not released."""
    alive: dict[int, int] = {}
    for address, change in _memory_events(prof):
        if change > 0:
            alive[address] = change
        else:
            alive.pop(address, None)
    return alive


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection that falls into one contestant's sample would be charged to that contestant."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
