"""DDP and FSDP2 over two processes: gradients are those of one process on the joined batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from processes import COUNT, in_two_processes
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import racecar

POLICIES = [("full", "store"), ("full", "recompute"), ("local", "store"), ("local", "recompute"), ("local", "deferred")]
REDUCTIONS = ["l2", "sum", "mean"]
BATCH = 6

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="this PyTorch was built without gloo")


def block(c_in: int, c_out: int, norm: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3), *[nn.GroupNorm(2, c_out)] * norm, nn.Tanh())


def chain(norm: bool = True) -> nn.Sequential:
    """Three blocks, the first of which is pooled."""
    torch.manual_seed(0)
    return nn.Sequential(block(2, 4, norm), nn.MaxPool2d(2), block(4, 6, norm), block(6, 4, norm)).double()


class Classifier(nn.Module):
    """A model of which a part is wrapped."""

    def __init__(self) -> None:
        super().__init__()
        self.features = chain()
        self.head = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def batch() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(BATCH, 2, 14, 14, dtype=torch.float64)


def share(x: Tensor, rank: int) -> Tensor:
    return x.chunk(COUNT)[rank]


def loss_of(out: Tensor, part: nn.Module) -> Tensor:
    """The task's share is a mean over the batch, as usual."""
    return out.square().mean() + part.reverse_loss


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone() for p in model.parameters()]


def alone(model: nn.Module, part: nn.Module, x: Tensor, **options) -> list[Tensor]:
    """Gradients of one process."""
    racecar.wrap(part, 0.1, **options)
    loss_of(model(x), part).backward()
    return gradients(model)


def agree(found: dict, wanted: Callable[..., list[Tensor]]) -> None:
    assert found
    for key, got in found.items():
        torch.testing.assert_close(got, wanted(*key), msg=lambda text, key=key: f"{key}: {text}")


# ------------------------------------------------------------------------------------------- DDP


def every_policy_and_reduction(rank: int) -> dict:
    found, x = {}, share(batch(), rank)
    for (variant, memory), reduction in [(p, r) for p in POLICIES for r in REDUCTIONS]:
        net = racecar.wrap(chain(), 0.1, variant=variant, memory=memory, reduction=reduction)
        parallel = DistributedDataParallel(net)
        loss_of(parallel(x), net).backward()
        found[variant, memory, reduction] = gradients(net)
    return found


def test_ddp_has_the_gradients_of_the_joined_batch(tmp_path) -> None:
    def wanted(variant: str, memory: str, reduction: str) -> list[Tensor]:
        net = chain()
        return alone(net, net, batch(), variant=variant, memory=memory, reduction=reduction)

    agree(in_two_processes(every_policy_and_reduction, tmp_path), wanted)


OPTIONS = {
    "plain": {},
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
    "DDP first": {},
}


def ways_of_wrapping(rank: int) -> dict:
    found, x = {}, share(batch(), rank)
    for (variant, memory), name in [(p, o) for p in POLICIES for o in OPTIONS]:
        model = Classifier()
        part = model.features
        if name != "DDP first":
            racecar.wrap(part, 0.1, variant=variant, memory=memory)
        parallel = DistributedDataParallel(model, **OPTIONS[name])
        if name == "DDP first":
            racecar.wrap(part, 0.1, variant=variant, memory=memory)
        for _ in range(2):  # a static graph is one from its second step on
            parallel.zero_grad()
            loss_of(parallel(x), part).backward()
        found[variant, memory, name] = gradients(model)
    return found


def test_ddp_around_a_model_with_a_wrapped_part(tmp_path) -> None:
    def wanted(variant: str, memory: str, _: str) -> list[Tensor]:
        model = Classifier()
        return alone(model, model.features, batch(), variant=variant, memory=memory)

    agree(in_two_processes(ways_of_wrapping, tmp_path), wanted)


def accumulated(rank: int) -> dict:
    found, parts = {}, share(batch(), rank).split(1)
    for variant, memory in POLICIES:
        net = racecar.wrap(chain(), 0.1, variant=variant, memory=memory)
        parallel = DistributedDataParallel(net)
        for i, x in enumerate(parts):
            with parallel.no_sync() if i + 1 < len(parts) else nullcontext():
                (parallel(x).square().mean() / len(parts) + net.reverse_loss).backward()
        found[variant, memory] = gradients(net)
    return found


def test_ddp_accumulates_gradients(tmp_path) -> None:
    """`l2` is a sum over the whole batch, of which every step adds a part; the task's mean is divided by the steps."""

    def wanted(variant: str, memory: str) -> list[Tensor]:
        net = chain()
        return alone(net, net, batch(), variant=variant, memory=memory)

    agree(in_two_processes(accumulated, tmp_path), wanted)


def unwrapped_within(rank: int) -> dict:
    """Phase I, phase II and a new λ with one DDP and one optimiser."""
    net = racecar.wrap(chain(), 0.1)
    parallel = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(parallel.parameters(), 1e-3)
    for step in range(4):
        if step == 1:
            net.lam = 0.02
        if step == 3:
            net.unwrap()
        optimizer.zero_grad()
        out = parallel(share(batch(), rank)).square().mean()
        (out if step == 3 else out + net.reverse_loss).backward()
        optimizer.step()
    others = [torch.empty_like(net[0][0].weight) for _ in range(COUNT)]
    distributed.all_gather(others, net[0][0].weight.detach())
    return {(): [*net.parameters()], ("same everywhere",): [torch.equal(*others)]}


def test_ddp_trains_on_after_unwrap(tmp_path) -> None:
    found = in_two_processes(unwrapped_within, tmp_path)
    assert found.pop(("same everywhere",)) == [True]
    net = racecar.wrap(chain(), 0.1)
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    for lam in (0.1, 0.02, 0.02, 0.0):
        net.lam = lam
        optimizer.zero_grad()
        loss_of(net(batch()), net).backward()
        optimizer.step()
    torch.testing.assert_close(found[()], [*net.parameters()])


def normalised() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3)).double()


def by_its_own_batch(rank: int) -> dict:
    found, x = {}, share(batch(), rank)
    for (variant, memory), reduction in [(p, r) for p in POLICIES for r in REDUCTIONS]:
        net = racecar.wrap(normalised(), 0.1, variant=variant, memory=memory, reduction=reduction)
        parallel = DistributedDataParallel(net)
        loss_of(parallel(x), net).backward()
        found[variant, memory, reduction] = gradients(net)
    return found


def test_ddp_normalises_in_every_process_by_itself(tmp_path) -> None:
    """As plain DDP: the gradient is the average of what each process finds with its own statistics."""

    def wanted(variant: str, memory: str, reduction: str) -> list[Tensor]:
        halves = []
        for x in batch().chunk(COUNT):
            net = racecar.wrap(normalised(), 0.1, variant=variant, memory=memory, reduction=reduction)
            whole = 1 if reduction == "mean" else COUNT  # a sum over the whole batch, not over this process's
            (net(x).square().mean() + whole * net.reverse_loss).backward()
            halves.append(gradients(net))
        return [(a + b) / 2 for a, b in zip(*halves, strict=True)]

    agree(in_two_processes(by_its_own_batch, tmp_path), wanted)


def synchronised(rank: int) -> dict:
    """Its forward needs a GPU; what wrap and the reverse pass say of it does not."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(normalised())
    plan = str(racecar.wrap(model, 0.1).plan)
    later = racecar.wrap(normalised(), 0.1)
    nn.SyncBatchNorm.convert_sync_batchnorm(later)
    try:
        later(share(batch(), rank))
        return {"plan": plan, "said": "nothing"}
    except Exception as error:
        return {"plan": plan, "said": f"{type(error).__name__}: {error}"}


def test_synchronised_batch_norm_is_left_out_with_a_sentence(tmp_path) -> None:
    found = in_two_processes(synchronised, tmp_path)
    assert "SyncBatchNorm takes its statistics over all processes, which the reverse pass does not" in found["plan"]
    assert "RuntimeError: the BatchNorm2d that the reverse of layer '3' runs through" in found["said"]


# ------------------------------------------------------------------------------------------- FSDP2


def shard(net: nn.Sequential, how: str) -> nn.Module:
    mesh = init_device_mesh("cpu", (COUNT,))
    if how.startswith("blocks"):
        for part in net:
            if isinstance(part, nn.Sequential):
                fully_shard(part, mesh=mesh, reshard_after_forward=how == "blocks, freed")
    return fully_shard(net, mesh=mesh, reshard_after_forward=True if how == "root, freed" else None)


def sharded_cases() -> Iterator[tuple[str, str, str, str]]:
    for variant, memory in POLICIES:
        for how in ("root", "root, freed", "blocks", "blocks, freed"):
            if variant == "local" or how != "blocks, freed":
                for loss in ("both", "reverse"):
                    yield variant, memory, how, loss


def sharded(rank: int) -> dict:
    found, x = {}, share(batch(), rank)
    for case in sharded_cases():
        variant, memory, how, loss = case
        net = shard(racecar.wrap(chain(), 0.1, variant=variant, memory=memory), how)
        for _ in range(2):
            net.zero_grad()
            out = net(x)
            (loss_of(out, net) if loss == "both" else net.reverse_loss).backward()
        found[case] = gradients(net)
    return found


def test_fsdp_has_the_gradients_of_the_joined_batch(tmp_path) -> None:
    def wanted(variant: str, memory: str, _: str, loss: str) -> list[Tensor]:
        net = racecar.wrap(chain(), 0.1, variant=variant, memory=memory)
        out = net(batch())
        (loss_of(out, net) if loss == "both" else net.reverse_loss).backward()
        return gradients(net)

    agree(in_two_processes(sharded, tmp_path), wanted)


def sharded_then_wrapped(rank: int) -> dict:
    found, x = {}, share(batch(), rank)
    mesh = init_device_mesh("cpu", (COUNT,))
    for variant, memory in POLICIES:
        net = racecar.wrap(shard(chain(), "root"), 0.1, variant=variant, memory=memory)
        loss_of(net(x), net).backward()
        found[variant, memory, "shard, then wrap"] = gradients(net)
        net.unwrap()(x).sum().backward()  # goes on without the reverse pass
        model = Classifier()
        part = racecar.wrap(model.features, 0.1, variant=variant, memory=memory)
        fully_shard(model, mesh=mesh)
        loss_of(model(x), part).backward()
        found[variant, memory, "part"] = gradients(model)
        net = racecar.wrap(chain(), 0.1, variant=variant, memory=memory)
        fully_shard(net, mesh=mesh).unshard()
        found[variant, memory, "reconstruct"] = [net.reconstruct(batch())]
    return found


def test_fsdp_in_any_order(tmp_path) -> None:
    def wanted(variant: str, memory: str, what: str) -> list[Tensor]:
        model = Classifier() if what == "part" else chain()
        part = model.features if what == "part" else model
        found = alone(model, part, batch(), variant=variant, memory=memory)
        return [part.reconstruct(batch())] if what == "reconstruct" else found

    agree(in_two_processes(sharded_then_wrapped, tmp_path), wanted)


def refused(rank: int) -> dict:
    said, x = {}, share(batch(), rank)
    mesh = init_device_mesh("cpu", (COUNT,))

    def attempt(what: str, action: Callable[[], object]) -> None:
        try:
            action()
            said[what] = "nothing"
        except Exception as error:
            said[what] = f"{type(error).__name__}: {error}"

    full = shard(racecar.wrap(chain(), 0.1, variant="full"), "blocks, freed")
    attempt("full over blocks", lambda: full(x))
    attempt("reconstruct", lambda: full.reconstruct(x))
    attempt("unwrap", full.unwrap)

    local = racecar.wrap(chain(), 0.1, variant="local")
    for module in [m for m in local.modules() if isinstance(m, nn.Conv2d)]:
        fully_shard(module, mesh=mesh)
    fully_shard(local, mesh=mesh)
    attempt("local over operations", lambda: local(x))

    part = racecar.wrap(chain(), 0.1)
    outer = nn.Sequential(fully_shard(nn.Sequential(part), mesh=mesh), nn.Flatten())
    fully_shard(outer, mesh=mesh)
    out = outer(x)
    attempt("a block around", lambda: loss_of(out, part).backward())
    return said


def test_fsdp_refuses_the_rest_with_a_sentence(tmp_path) -> None:
    said = in_two_processes(refused, tmp_path)
    assert "RuntimeError: a full reverse reads the weights of all layers" in said["full over blocks"]
    assert "those of '3.0'" in said["full over blocks"] and "variant='local'" in said["full over blocks"]
    assert "RuntimeError: a local reverse" in said["local over operations"]
    assert "those of '0.0'" in said["local over operations"]
    assert "unshard()" in said["reconstruct"]
    assert "RuntimeError: the model's class was changed to FSDP" in said["unwrap"]
    assert "RuntimeError: FSDP2 has freed weights" in said["a block around"]
