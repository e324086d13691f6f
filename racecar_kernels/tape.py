"""Runs a chain's forward or backward without Python, once it has been seen to come again with the same shapes.

What Python decides in `chain.py` and below follows from shapes, types, strides, the chain's description and PyTorch's
precision of float32 products alone. So the second call with the same ones is recorded, every operator of PyTorch and
every kernel in turn, and from the third on the extension replays that in one call (`csrc/tape_binding.cpp`): same
numbers, bit by bit, and every tensor let go after its last use, as Python would. `python -m bench.overhead` times a
layer with and without it.

Not recorded is what looks into a tensor to decide (none of the package's own kernels does), and what runs where
something watches: a mode, a compiler, a transform.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import extension

MaybeTensors = Sequence["Tensor | None"]
P = ParamSpec("P")
R = TypeVar("R")

MOST = 256  # kinds of calls that are remembered; the one that was not used for longest is forgotten
SHAPES = 8  # tapes of one kind, each for other shapes; likewise
SEEN = 32  # shapes of one kind of which it is known that they came; likewise

enabled = True
"""Whether calls are recorded and replayed. For tests and measurements."""


class Known(NamedTuple):
    """A tape, how its results are nested, and what it was recorded for."""

    tape: Any
    nesting: Any
    shapes: Hashable


class Tapes:
    """All tapes of one kind of call: what it does is said by a description, its tensors' shapes come as they come.

    Of `SHAPES` tapes and `SEEN` shapes the one not used for longest makes room. Asked and told under `_LOCK`.
    """

    def __init__(self) -> None:
        self.known: list[Known] = []  # the last used one first
        self.seen: OrderedDict[Hashable, str | None] = OrderedDict()  # shapes that came; why they cannot be recorded
        self.recording: set[Hashable] = set()  # what some thread is about

    def find(self, tensors: list[Tensor | None]) -> Known | None:
        for i, own in enumerate(self.known):
            if own.tape.fits(tensors):
                self.known.insert(0, self.known.pop(i))
                return own
        return None

    def to_record(self, shapes: Hashable) -> bool:
        """Whether these shapes have come before and may be recorded; then `recorded` or `given_up` has to follow."""
        before = shapes in self.seen
        self.seen.setdefault(shapes, None)
        self.seen.move_to_end(shapes)
        if len(self.seen) > SEEN:
            self.seen.popitem(last=False)
        if not before or self.seen[shapes] is not None or shapes in self.recording:
            return False
        self.recording.add(shapes)
        return True

    def recorded(self, own: Known, why_not: str | None) -> None:
        """Takes the tape, unless it is not complete."""
        self.recording.discard(own.shapes)
        if why_not is not None:
            self.seen[own.shapes] = why_not
            return
        self.known.insert(0, own)
        if len(self.known) > SHAPES:
            self.seen.pop(self.known.pop().shapes, None)  # it has to come twice again

    def given_up(self, shapes: Hashable) -> None:
        self.recording.discard(shapes)


_TAPES: OrderedDict[Hashable, Tapes] = OrderedDict()
_LOCK = threading.Lock()


def forget() -> None:
    """Drops all tapes."""
    with _LOCK:
        _TAPES.clear()


def is_watched(tensors: MaybeTensors) -> bool:
    """Whether a mode, a transform, a compiler or a tensor's own class has to see the operator."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or any(t is not None and (type(t) not in (Tensor, torch.nn.Parameter) or t.is_neg()) for t in tensors)
    )


def run(
    key: Hashable, tensors: list[Tensor | None], function: Callable[[], Any], let_go: Callable[[], None] | None = None
) -> Any:
    """What `function` gives, nested lists and tuples of tensors and None; replayed where that is known already.

    Args:
        key: all that decides what is done, but for shapes, strides, types and devices of `tensors`, and the precision
            of float32 products.
        tensors: all that `function` reads.
        function: changes none of them.
        let_go: called in front of a replay, to drop every other reference to tensors that may then be let go one by
            one. `tensors` is emptied, too.
    """
    module = extension.load() if enabled else None
    if (
        module is None
        or extension.recorder() is not None
        or any(t is not None and t.layout != torch.strided for t in tensors)
    ):
        return function()
    key = (key, _precisions(tensors))
    with _LOCK:
        tapes = _TAPES.setdefault(key, Tapes())
        _TAPES.move_to_end(key)
        if len(_TAPES) > MOST:
            _TAPES.popitem(last=False)
        found = tapes.find(tensors)
    if found is not None:
        if let_go is not None:
            let_go()
        return _nested(found.nesting, iter(found.tape.run(tensors)))
    shapes = tuple(None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors)
    with _LOCK:
        to_record = tapes.to_record(shapes)
    return _recorded(tapes, shapes, module, tensors, function) if to_record else function()


def _recorded(tapes: Tapes, shapes: Hashable, module: Any, tensors: MaybeTensors, function: Callable[[], Any]) -> Any:
    """What `function` gives, written down."""
    try:
        recorder = Recorder(module, tensors)
        with recorder:
            result = function()
        flat: list[Tensor | None] = []
        nesting = _flattened(result, flat)
        why_not = recorder.finish(flat)
    except BaseException:
        with _LOCK:
            tapes.given_up(shapes)
        raise
    with _LOCK:
        tapes.recorded(Known(recorder.tape, nesting, shapes), why_not)
    return result


def _precisions(tensors: MaybeTensors) -> tuple[str, ...]:
    """PyTorch's settings for products of matrices and convolutions in float32: kernels are chosen and told by them."""
    if all(t is None or t.dtype != torch.float32 for t in tensors):
        return ()
    conv: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return torch.backends.cuda.matmul.fp32_precision, conv


class Recorder(TorchDispatchMode):
    """Writes down what runs: operators as a dispatch mode sees them, kernels as `extension.load` hands them out."""

    def __init__(self, module: Any, inputs: MaybeTensors):
        super().__init__()
        self.module, self.tape = module, module.Tape(inputs)
        self.failed: str | None = None

    def __enter__(self) -> Any:
        extension.recorded_by(self, _Kernels(self))
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        extension.recorded_by(None)
        super().__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        schema, results = func._schema, _tensors(result)
        if results is None:
            self.refuse(f"{schema.name} gives a number, which may decide what is done")
        else:
            self.write([args, kwargs], self.tape.add_operator, schema.name, schema.overload_name, args, kwargs, results)
        return result

    def kernel(self, name: str, args: tuple[Any, ...]) -> Any:
        """A kernel of the extension."""
        with torch._C._DisableTorchDispatch():
            result = getattr(self.module, name)(*args)
        self.write(args, self.tape.add_kernel, name, args, _tensors(result))
        return result

    def launch(self, launcher: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A function that launches kernels, as one instruction: Python runs it again at every replay."""
        extension.recorded_by(None)
        try:
            with torch._C._DisableTorchDispatch():
                result = launcher(*args, **kwargs)
        finally:
            extension.recorded_by(self, _Kernels(self))
        read: list[Tensor | None] = []
        given = _flattened((args, tuple(kwargs.values())), read)

        def again(tensors: list[Tensor | None]) -> list[Tensor | None] | None:
            args, values = _nested(given, iter(tensors))
            return _tensors(launcher(*args, **dict(zip(kwargs, values, strict=True))))

        written = _tensors(result)
        closed = next((own.value for own in _others(given) if not _holds_no_tensor(own.value)), None)
        if closed is not None:
            self.refuse(f"{launcher} is given {type(closed).__name__}, in which tensors would not be found")
        elif written is None:
            self.refuse(f"{launcher} gives something else than tensors")
        else:
            self.write(read, self.tape.add_call, again, read, written)
        return result

    def refuse(self, why: str) -> None:
        """What runs is not to be replayed."""
        self.failed = self.failed or why

    def write(self, read: Any, add: Callable[..., None], *instruction: Any) -> None:
        """Adds an instruction, unless it reads a tensor from elsewhere: the next time it may be another one."""
        if self.failed is None and not self.knows(read):
            self.failed = f"a tensor from elsewhere is read by {instruction[0]}"
        if self.failed is None:
            try:
                add(*instruction)
            except (RuntimeError, TypeError, ValueError, IndexError) as e:
                self.failed = f"{instruction[0]} cannot be written down: {e}"

    def knows(self, value: Any) -> bool:
        """Whether every tensor in a value came in or was made here."""
        if isinstance(value, Tensor):
            return bool(self.tape.knows(value))
        if isinstance(value, dict):
            value = tuple(value.values())
        return all(map(self.knows, value)) if isinstance(value, (tuple, list)) else True

    def finish(self, results: MaybeTensors) -> str | None:
        """None if the tape is complete, else why it is not."""
        if self.failed is None and not self.knows(list(results)):
            self.failed = "a tensor from elsewhere is given back"
        if self.failed is None:
            self.tape.finish(results)
        return self.failed


def one_instruction(launch: Callable[P, R]) -> Callable[P, R]:
    """A function that launches kernels: while its call is recorded, it is one instruction, whatever it runs inside.

    Its result is tensors and None, alone or in tuples; what it reads are tensors in its arguments, alone, in tuples or
    in lists. Beside them it takes strings, numbers and frozen dataclasses of those: given anything else, in which a
    tensor could hide, it runs, but is not recorded.
    """

    @functools.wraps(launch)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        recorder = extension.recorder()
        if recorder is None:
            return launch(*args, **kwargs)
        done: R = recorder.launch(launch, args, kwargs)
        return done

    return call


class _Kernels:
    """The extension, as it is seen while its kernels are recorded."""

    def __init__(self, recorder: Recorder):
        self.recorder = recorder

    def __getattr__(self, name: str) -> Any:
        if name in self.recorder.module.recordable:
            return lambda *args: self.recorder.kernel(name, args)
        if name != "serves":  # which looks at shapes alone
            self.recorder.refuse(f"{name} cannot be replayed")
        return getattr(self.recorder.module, name)


_PLAIN = (str, int, float, torch.dtype, torch.device, torch.memory_format)


class _Other(NamedTuple):
    """What is no tensor and holds none."""

    value: Any


def _flattened(value: Any, into: list[Tensor | None]) -> Any:
    """Appends the tensors and None of a nested value in turn; gives all the rest of it."""
    if value is None or isinstance(value, Tensor):
        into.append(value)
        return None
    if isinstance(value, (tuple, list)):
        return type(value), [_flattened(v, into) for v in value]
    return _Other(value)


def _tensors(value: Any) -> list[Tensor | None] | None:
    """The tensors and None of a nested value in turn; None where there is something else in it."""
    into: list[Tensor | None] = []
    return into if next(_others(_flattened(value, into)), None) is None else None


def _others(rest: Any) -> Iterator[_Other]:
    """All of what `_flattened` gives that is no tensor."""
    if isinstance(rest, _Other):
        yield rest
    elif rest is not None:
        for part in rest[1]:
            yield from _others(part)


def _holds_no_tensor(value: Any) -> bool:
    """Whether this is known; what cannot be looked into may hold one, or change."""
    if isinstance(value, tuple):
        return all(map(_holds_no_tensor, value))
    if is_dataclass(value) and not isinstance(value, type):
        frozen = type(value).__dataclass_params__.frozen  # type: ignore[attr-defined]
        return frozen and all(_holds_no_tensor(getattr(value, field.name)) for field in fields(value))
    return value is None or isinstance(value, _PLAIN)


def _nested(rest: Any, left: Iterator[Tensor | None]) -> Any:
    """The value again, of other tensors."""
    if rest is None:
        return next(left)
    if isinstance(rest, _Other):
        return rest.value
    kind, parts = rest
    inside = [_nested(part, left) for part in parts]
    return kind(*inside) if hasattr(kind, "_fields") else kind(inside)
