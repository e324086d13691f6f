"""`racecar.wrap` on real modules: losses and gradients, planning, state, and being a good citizen of torch.nn."""

from __future__ import annotations

import copy
import io
import pickle
from itertools import pairwise

import cases
import oracle
import pytest
import torch
from torch import nn

import racecar

POLICIES = [("full", "store"), ("full", "recompute"), ("local", "store"), ("local", "recompute"), ("local", "deferred")]
each_policy = pytest.mark.parametrize(("variant", "memory"), POLICIES)


def network() -> tuple[nn.Sequential, torch.Tensor]:
    """Three layers with a norm, a dropout, a pooling, an up-sampling and a head."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()), nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 3, padding=1), nn.Tanh(), nn.Upsample(scale_factor=2),
        nn.Conv2d(5, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(192, 4),
    )  # fmt: skip
    return net.double(), torch.randn(3, 2, 8, 8, dtype=torch.float64)


def layers_of(net: nn.Sequential) -> list:
    """The same network as the oracle takes it."""
    stem = net[0]
    return [([], stem[0], [stem[1], stem[2]]), ([net[1]], net[2], [net[3]]), ([net[4]], net[5], [net[6]])]


def mlp(*sizes: int) -> nn.Sequential:
    return nn.Sequential(*[m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())])


def gradients(net: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    params = list(net.parameters())
    grads = torch.autograd.grad(loss, params, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]


@pytest.mark.parametrize("norm", ["batch", "running"])
@each_policy
def test_losses_and_gradients(variant: str, memory: str, norm: str) -> None:
    net, x = network()
    net[0][1].momentum = 0.0
    wanted = oracle.chain_losses(layers_of(net), x, variant=variant, norm=norm)
    lam = [0.5, 0.2, 0.9]
    want = gradients(net, 2 * sum(w * v for w, v in zip(lam, wanted, strict=True)))
    wrapped = racecar.wrap(net, lam, variant=variant, memory=memory, norm=norm)
    y = wrapped(x)
    total = wrapped.reverse_loss
    got = gradients(net, 2 * total + 0 * y.sum())
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-10)
    assert list(wrapped.reverse_losses) == ["0.0", "2", "5"]
    for value, w in zip(wrapped.reverse_losses.values(), wanted, strict=True):
        torch.testing.assert_close(value, w.detach())
        assert not value.requires_grad


def test_deferred_is_known_after_the_backward() -> None:
    net, x = network()
    want = racecar.wrap(copy.deepcopy(net), 0.5, variant="local")
    want(x)
    net = racecar.wrap(net, 0.5, variant="local", memory="deferred")
    loss = net(x).sum() + net.reverse_loss
    assert net.reverse_loss.item() == 0 and net.reverse_losses == {}
    loss.backward()
    torch.testing.assert_close(net.reverse_loss, want.reverse_loss.detach())
    assert net.reverse_losses.keys() == want.reverse_losses.keys()


@each_policy
def test_under_no_grad_the_value_is_there(variant: str, memory: str) -> None:
    net, x = network()
    net = racecar.wrap(net, 0.5, variant=variant, memory=memory)
    with torch.no_grad():
        net(x)
    assert not net.reverse_loss.requires_grad
    assert net.reverse_loss.item() > 0 and len(net.reverse_losses) == 3


def test_recompute_cuts_long_chains_and_changes_nothing() -> None:
    torch.manual_seed(0)
    net, x = mlp(6, 30, 4, 17, 3, 9, 5, 8).double(), torch.randn(4, 6, dtype=torch.float64)
    results = []
    for memory in ("store", "recompute"):
        wrapped = racecar.wrap(net, 0.3, variant="full", memory=memory)
        wrapped(x)
        results.append(gradients(net, wrapped.reverse_loss))
        wrapped.unwrap()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "sizes", [(1,), (4, 4, 4, 4, 4, 4, 4, 4, 4), (9, 1, 8, 2, 7), (1, 16, 1, 1, 16, 2), (5, 4, 3, 2, 1)]
)
def test_cuts_are_the_best_there_are(sizes: tuple[int, ...]) -> None:
    from itertools import combinations

    from racecar.segments import split

    def cost(lengths: list[int]) -> int:
        at, kept, held = 0, 0, 0
        for i, length in enumerate(lengths):
            held = max(held, sum(sizes[at : at + length]))
            at += length
            kept += sizes[at - 1] if i + 1 < len(lengths) else 0
        return kept + held

    n = len(sizes)
    every = [c for k in range(n) for c in combinations(range(1, n), k)]
    best = min(cost([b - a for a, b in zip([0, *c], [*c, n], strict=True)]) for c in every)
    assert sum(split(sizes)) == n
    assert cost(split(sizes)) == best


def test_cuts_of_a_very_deep_chain_are_found_quickly() -> None:
    from racecar.segments import split

    lengths = split(tuple(100 + i % 7 for i in range(300)))
    assert sum(lengths) == 300 and 10 < len(lengths) < 30  # about √300


def test_auto() -> None:
    net, _ = network()
    assert racecar.wrap(net, 1.0).plan.variant == "full"
    with pytest.raises(ValueError, match="needs variant='local'"):
        racecar.wrap(net.unwrap(), 1.0, memory="deferred")
    assert type(net) is nn.Sequential


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x)


def test_a_block_that_is_no_chain_makes_a_graph_of_the_model() -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), Residual(), nn.Conv2d(4, 2, 3))

    with pytest.raises(
        ValueError, match=r"unique path.*the output of '1' behind '0' goes to '2.conv' and 'add'.*local"
    ):
        racecar.wrap(build(), 1.0, variant="full")
    net = racecar.wrap(build(), 1.0)
    assert net.plan.variant == "local" and net.plan.names == ["0", "2.conv", "3"]
    net(torch.randn(2, 2, 8, 8))
    assert all(value.item() > 0 for value in net.reverse_losses.values())


def test_the_plan_prints_what_happens() -> None:
    net, _ = network()
    text = str(racecar.wrap(net, 1.0, layers=2).plan)
    assert text.splitlines()[0].split() == ["layer", "tied", "to", "variant", "kernel", "why", "not,", "or", "note"]
    for piece in (
        "Conv2d 5->4, BatchNorm2d, ReLU, undo MaxPool2d",
        "layers=2",
        cases.BACKENDS[0],
        "Flatten",
        "behind '7'",
    ):
        assert piece in text


@pytest.mark.parametrize(
    ("modules", "names", "reason"),
    [
        ([nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(3, 2, 3)], ["0"], "ReLU behind pooling"),
        ([nn.Conv2d(2, 3, 3), nn.Softmax(1), nn.Conv2d(3, 2, 3)], ["0"], "Softmax"),
        ([nn.Conv2d(2, 3, 3), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(3, 2, 3)], ["0"], "bilinear"),
        ([nn.Conv2d(2, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 2, 1)], ["0"], "AdaptiveAvgPool2d"),
        ([nn.Conv2d(2, 3, 3), nn.ConvTranspose2d(3, 2, 3)], ["0"], "ConvTranspose2d"),
        ([nn.Conv2d(2, 3, 3), nn.LayerNorm((3, 6, 6)), nn.MaxPool2d(2), nn.Conv2d(3, 2, 3)], ["0"], "layer norm over"),
        ([nn.Identity(), nn.Conv2d(2, 3, 3), nn.Dropout(0.5), nn.ReLU(), nn.Conv2d(3, 2, 3)], ["1", "4"], None),
        ([nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3), nn.ReLU()], ["1"], None),
        ([nn.MaxPool2d(2), nn.Conv2d(2, 3, 3), nn.ReLU()], ["1"], None),
    ],
    ids=lambda v: "" if not isinstance(v, list) else "-".join(type(m).__name__ for m in v if isinstance(m, nn.Module)),
)
def test_what_chains_are_made_of(modules: list[nn.Module], names: list[str], reason: str | None) -> None:
    net = racecar.wrap(nn.Sequential(*modules), 1.0, variant="full")
    assert net.plan.names == names
    assert reason is None or any(reason in why for _, why in net.plan.left_out)
    net(torch.randn(2, 2, 8, 8))
    assert list(net.reverse_losses) == names
    net.reverse_loss.backward()
    assert all(p.grad is not None for p in modules[[type(m) for m in modules].index(nn.Conv2d)].parameters())


def test_a_module_used_twice_is_two_layers() -> None:
    torch.manual_seed(0)
    conv, relu = nn.Conv2d(3, 3, 3, padding=1).double(), nn.ReLU()
    net = nn.Sequential(conv, relu, conv, relu, nn.Flatten(), nn.ReLU())
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    wanted = oracle.chain_losses([([], conv, [relu]), ([], conv, [relu])], x)
    want = gradients(net, sum(wanted))
    net = racecar.wrap(net, 1.0)
    net(x)
    assert list(net.reverse_losses) == ["0", "2#2"]
    for g, w in zip(gradients(net, net.reverse_loss), want, strict=True):
        torch.testing.assert_close(g, w)


@each_policy
def test_in_place_modules_do_not_disturb_what_is_compared(variant: str, memory: str) -> None:
    def build(inplace: bool) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(4, 5), nn.Dropout(0.5, inplace), nn.Linear(5, 6), nn.ReLU(inplace), nn.Linear(6, 3),
            nn.Dropout(0.5, inplace), nn.Flatten(), nn.ReLU(inplace),
        ).double()  # fmt: skip

    x, results = torch.randn(3, 4, dtype=torch.float64), []
    for inplace in (False, True):
        net = racecar.wrap(build(inplace), 0.3, variant=variant, memory=memory)
        torch.manual_seed(5)
        loss = net(x).sum() + net.reverse_loss
        results.append([loss.detach(), *gradients(net, loss)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_copies_and_pickles_are_wrapped_models_of_their_own() -> None:
    net, x = network()
    net = racecar.wrap(net, 0.5)
    loss = net(x).sum() + net.reverse_loss
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert type(other) is type(net) and isinstance(other, nn.Sequential)
        other(x)
        torch.testing.assert_close(other.reverse_loss, net.reverse_loss)
        other.lam = 0.0
        assert net.lam == [0.5] * 3
        assert type(other.unwrap()) is nn.Sequential
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in other.modules())
    loss.backward()
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    again.eval(), net.eval()
    torch.testing.assert_close(again(x), net(x))


def test_a_slice_is_a_plain_sequential() -> None:
    net, x = network()
    net = racecar.wrap(net, 0.5)
    part = net[:2]
    assert isinstance(part, nn.Sequential)
    torch.testing.assert_close(part(x), net[1](net[0](x)))
    with pytest.raises(AttributeError, match="part of a wrapped model"):
        _ = part.plan
    net.unwrap()
    assert racecar.wrap(part, 0.5).plan.names == ["0.0"]


def test_a_model_changed_behind_the_plan_is_noticed() -> None:
    net = racecar.wrap(mlp(3, 3, 3), 1.0)
    net[2] = nn.Identity()
    with pytest.raises(RuntimeError, match="ran 1 of the 2 planned layers"):
        net(torch.randn(2, 3))
    net.eval()(torch.randn(2, 3))


def test_parts_run_on_their_own() -> None:
    net, x = network()
    net = racecar.wrap(net, 0.5)
    assert net[0](x).shape == (3, 4, 8, 8)  # outside a forward of the model the hooks do nothing


def test_reconstruct_through_a_flatten_and_a_pool() -> None:
    torch.manual_seed(0)
    net = racecar.wrap(nn.Sequential(nn.Flatten(), *mlp(36, 8)), 1.0)
    x = torch.randn(2, 1, 6, 6)
    assert net.reconstruct(x).shape == x.shape
    net = racecar.wrap(nn.Sequential(nn.Dropout(0.5), nn.MaxPool2d(2), nn.Conv2d(1, 3, 3), nn.ReLU()), 0.0)
    state = torch.get_rng_state()
    assert net.reconstruct(x).shape == x.shape
    assert torch.equal(state, torch.get_rng_state())


def test_the_graph_of_the_last_forward_is_let_go() -> None:
    """Only results are left on the module, and the next forward drops even those first."""
    net, x = network()
    net = racecar.wrap(net, 0.5)
    net(x)
    engine = net.__dict__["_racecar_engine"]
    assert engine.run is None and engine.result.sums is not None and not engine.result.sums.requires_grad


@each_policy
def test_autocast_trains(variant: str, memory: str) -> None:
    net, x = network()
    net, x = racecar.wrap(net.float(), 1e-3, variant=variant, memory=memory), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(x).float().square().mean() + net.reverse_loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(
        p.grad is not None and p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in net.parameters()
    )


@each_policy
def test_compiles_into_one_graph(variant: str, memory: str) -> None:
    net, x = network()
    net = racecar.wrap(net, 0.5, variant=variant, memory=memory)

    def step(x: torch.Tensor) -> torch.Tensor:
        return net(x).sum() + net.reverse_loss

    want = gradients(net, step(x))
    got = gradients(net, torch.compile(step, fullgraph=True, backend="aot_eager")(x))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def _one_of_two(rank: int, port: int, path: str) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    net, x = mlp(4, 3, 2), torch.randn(6, 4)
    results = {}
    for reduction in ("l2", "sum", "mean"):
        net.zero_grad()
        wrapped = racecar.wrap(net, 0.1, reduction=reduction)
        wrapped(x[3 * rank : 3 * rank + 3])
        wrapped.reverse_loss.backward()
        wrapped.unwrap()
        for p in net.parameters():  # what data-parallel training does to gradients
            torch.distributed.all_reduce(p.grad)
            p.grad /= 2
        results[reduction] = [p.grad.clone() for p in net.parameters()]
    if rank == 0:
        torch.save(results, path)
    torch.distributed.destroy_process_group()


def test_reductions_over_two_processes(tmp_path) -> None:
    """Averaged gradients equal those of one process on the joined batch, whatever the reduction."""
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    path = str(tmp_path / "gradients.pt")
    torch.multiprocessing.spawn(_one_of_two, (port, path), nprocs=2)
    results = torch.load(path)
    torch.manual_seed(0)
    net, x = mlp(4, 3, 2), torch.randn(6, 4)
    for reduction, got in results.items():
        wrapped = racecar.wrap(net, 0.1, reduction=reduction)
        wrapped(x)
        want = gradients(net, wrapped.reverse_loss)
        wrapped.unwrap()
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w)


def test_the_package_is_light_until_it_is_used() -> None:
    """`racecar --help` must not wait for PyTorch; the names are there all the same."""
    import subprocess
    import sys

    code = "import sys, racecar; assert 'torch' not in sys.modules; assert callable(racecar.wrap); racecar.Plan"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'unwrap'"):
        _ = racecar.unwrap
    assert {"wrap", "Plan", "__version__"} <= set(dir(racecar))
