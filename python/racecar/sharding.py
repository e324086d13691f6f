"""FSDP2 (`fully_shard`) beside a reverse pass: weights that are in pieces except while their own block runs.

FSDP2 gathers a block's weights before its forward and frees them behind it (`reshard_after_forward`); it gathers them
again when the gradient of the block's *output* arrives. The reverse pass reads weights at other times:

* in the forward, once a layer's output is known (local), or all of them at its end (full). What is in pieces by then is
  refused; the norm of the layer below, which a local reverse applies, is copied while it is whole.
* in the backward, where a reverse runs before its block's output has its gradient. There a hook on the reverse loss
  asks for the weights first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .engine import Operands
    from .plan import PlannedLayer

_FULL = (
    "a full reverse reads the weights of all layers at the end of the forward, where FSDP2 has freed those of "
    "{name!r}; apply fully_shard to the wrapped model as a whole and not to its parts, or pass it "
    "reshard_after_forward=False, or wrap with variant='local'"
)
_LOCAL = (
    "a local reverse reads the weights of a layer once its output is known, where FSDP2 has freed those of {name!r}; "
    "apply fully_shard to blocks that hold a layer's operation together with the norms and activations behind it, or "
    "pass it reshard_after_forward=False"
)
_FREED = (
    "FSDP2 has freed weights that the reverse pass needs in its backward, those of a block around the wrapped model; "
    "pass reshard_after_forward=False to the fully_shard of that block, or apply fully_shard to the wrapped model"
)
_RECONSTRUCT = (
    "reconstruct runs outside the forward that FSDP2 gathers weights for; call unshard() on every block that "
    "fully_shard was applied to first, and reshard() afterwards"
)


_REPLACED = (
    "the {kind} that the reverse of layer {name!r} runs through is no longer part of the model; it was replaced after "
    "wrapping, as SyncBatchNorm.convert_sync_batchnorm does, whose statistics the reverse pass does not have: call "
    "unwrap(), and wrap again after the change"
)


def shards_of(model: nn.Module) -> Shards | None:
    """For one forward of `model`; None where this process is the only one, and nothing can be in pieces."""
    return Shards(model) if _distributed() else None


def check_whole(modules: Iterable[nn.Module]) -> None:
    """Raises RuntimeError if `reconstruct` would meet weights in pieces."""
    if _distributed() and any(_in_pieces(p) for module in modules for p in module.parameters()):
        raise RuntimeError(_RECONSTRUCT)


def _distributed() -> bool:
    group = torch.distributed
    return group.is_available() and group.is_initialized() and not torch.compiler.is_compiling()


class Shards:
    """Who gathers the weights of a model's modules, and what was copied while it was whole, in one forward."""

    def __init__(self, model: nn.Module) -> None:
        from torch.distributed.fsdp import FSDPModule

        self.block_of: dict[nn.Module, Any] = {}
        for block in model.modules():  # from outside inwards, so that the innermost block stays
            if isinstance(block, FSDPModule):
                self.block_of.update(dict.fromkeys(block.modules(), block))
        self.copied: dict[int, list[Tensor | None]] = {}

    @staticmethod
    def check_norms(model: nn.Module, layers: Iterable[PlannedLayer]) -> None:
        """Raises RuntimeError if a norm has been replaced by one over all processes, or by any other module."""
        there = set(model.modules())
        for layer in layers:
            for module in layer.latent:
                if module not in there:
                    raise RuntimeError(_REPLACED.format(kind=type(module).__name__, name=layer.name))

    def copy(self, m: int, params: Iterable[Tensor | None]) -> None:
        """Keeps what the reverse of layer m will read of a block that is about to be freed; gradients flow through."""
        if self.block_of:
            self.copied[m] = [t if t is None or _in_pieces(t) else t.clone() for t in params]

    def kept(self, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        """The same of tensors that a call was seen with."""
        return tuple(t if t is None or not self.block_of else t.clone() for t in tensors)

    def whole(self, name: str, m: int, found: Operands, variant: str) -> Operands:
        """The operands of layer m, none of them in pieces.

        Raises:
            RuntimeError: FSDP2 has freed one of them.
        """
        found = found._replace(params=self.copied.get(m, found.params))
        if any(map(_in_pieces, (found.weight, found.bias, *found.params))):
            raise RuntimeError((_FULL if variant == "full" else _LOCAL).format(name=name))
        return found

    def gather_again(self, sums: Tensor, modules: Iterable[nn.Module], read: Sequence[Tensor | None]) -> None:
        """Has FSDP2 gather what it has freed of `read`, just before the backward of the reverse that gave `sums`."""
        if not sums.requires_grad:
            return
        memory = [t.untyped_storage() for t in read if t is not None and t.numel()]
        # in the same order in every process, since gathering is a collective operation
        blocks = dict.fromkeys(self.block_of[module] for module in modules if module in self.block_of)

        def before(grad: Tensor) -> None:
            if all(storage.size() for storage in memory):
                return
            for block in blocks:
                block.unshard()
            if not all(storage.size() for storage in memory):
                raise RuntimeError(_FREED)

        sums.register_hook(before)


def _in_pieces(tensor: Tensor | None) -> bool:
    """Whether every process holds only a piece of it, or it was a whole that has been freed since."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor) or (
        tensor is not None and tensor.numel() > 0 and tensor.untyped_storage().size() == 0
    )
