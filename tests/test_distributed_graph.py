"""DDP and FSDP2 with models that are planned as graphs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from processes import COUNT, in_two_processes
from test_distributed import agree, alone, gradients, loss_of, share
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import racecar

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="this PyTorch was built without gloo")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two, self.head = nn.Linear(4, 6), Block(), Block(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(torch.tanh(self.stem(x)))))


def model() -> nn.Module:
    torch.manual_seed(0)
    return Blocks().double()


def batch() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(6, 4, dtype=torch.float64)


def cases() -> Iterator[tuple[str, str, str]]:
    for memory in ("store", "recompute", "deferred"):
        for reduction in ("l2", "mean"):
            for how in ("DDP", "root", "blocks", "blocks, freed"):
                yield memory, reduction, how


def trained(rank: int) -> dict:
    found, x = {}, share(batch(), rank)
    mesh = init_device_mesh("cpu", (COUNT,))
    for memory, reduction, how in cases():
        net = racecar.wrap(model(), 0.1, memory=memory, reduction=reduction)
        if how.startswith("blocks"):
            for part in (net.one, net.two):
                fully_shard(part, mesh=mesh, reshard_after_forward=how == "blocks, freed")
        run = DistributedDataParallel(net) if how == "DDP" else fully_shard(net, mesh=mesh)
        for _ in range(2):
            run.zero_grad()
            loss_of(run(x), net).backward()
        found[memory, reduction, how] = gradients(net)
    return found


def test_gradients_are_those_of_the_joined_batch(tmp_path) -> None:
    def wanted(memory: str, reduction: str, _: str) -> list[Tensor]:
        net = model()
        return alone(net, net, batch(), memory=memory, reduction=reduction)

    agree(in_two_processes(trained, tmp_path), wanted)


def refused(rank: int) -> str:
    net = racecar.wrap(model(), 0.1)
    mesh = init_device_mesh("cpu", (COUNT,))
    for module in [m for m in net.modules() if isinstance(m, nn.Linear)]:
        fully_shard(module, mesh=mesh)
    fully_shard(net, mesh=mesh)
    try:
        net(share(batch(), rank))
        return "nothing"
    except RuntimeError as error:
        return str(error)


def test_operations_that_are_freed_before_their_reverse_are_refused(tmp_path) -> None:
    said = in_two_processes(refused, tmp_path)
    assert "a local reverse reads the weights of a layer once its output is known" in said and "'stem'" in said
