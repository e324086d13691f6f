"""Runs that are not what was planned, or not as usual: found and named, or right."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import racecar


class Switched(nn.Module):
    """conv1 -> relu -> conv2 -> relu -> linear, with what `more` says in between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.linear = nn.Linear(4 * 36, 2)
        self.more = ""
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(x)
        if self.more == "activation":
            h = torch.tanh(h)
        h = F.relu(h)
        if self.more == "in place later":
            h += 1.0
        h = self.conv2(h)
        if self.more == "norm":
            h = F.group_norm(h, 2)
        if self.more == "nothing":
            return self.linear(h.flatten(1))
        y = self.linear(F.relu(h).flatten(1))
        return F.elu(y) if self.more == "at the end" else y


def images() -> torch.Tensor:
    return torch.randn(2, 3, 6, 6, dtype=torch.float64)


@pytest.mark.parametrize("how", ["traced", "run"])
@pytest.mark.parametrize("more", ["activation", "norm", "in place later", "nothing", "at the end"])
def test_more_or_less_than_planned_is_refused(more: str, how: str) -> None:
    net, x = Switched(), images()
    wrapped = racecar.wrap(net, 0.1, variant="local", example=x if how == "run" else None)
    wrapped(x)
    net.more = more
    with pytest.raises(RuntimeError, match=r"when the model was planned.*unwrap and wrap again.*example=x"):
        wrapped(x)
    net.more = ""
    wrapped(x)


class SameTensor(Switched):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.conv1(x)).contiguous()
        return self.linear(F.relu(self.conv2(h).contiguous()).flatten(1))


@pytest.mark.parametrize("how", ["traced", "run"])
def test_an_operation_that_gives_its_input_back(how: str) -> None:
    net, x = SameTensor(), images()
    wrapped = racecar.wrap(net, 0.1, variant="local", example=x if how == "run" else None)
    wrapped(x)
    assert all(loss > 0 for loss in wrapped.reverse_losses.values())


class Checkpointed(Switched):
    reentrant = True
    frozen = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.conv1(x))
        if self.frozen:
            with torch.no_grad():
                h = self.conv2(h)
        else:
            h = checkpoint(self.conv2, h, use_reentrant=self.reentrant)
        return self.linear(F.relu(h).flatten(1))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_inside_is_refused(reentrant: bool) -> None:
    net, x = Checkpointed(), images()
    net.reentrant = reentrant
    wrapped = racecar.wrap(net, 0.1, variant="local", example=x)
    with pytest.raises(RuntimeError, match=r"checkpoint inside the model runs layer 'conv2'.*around the wrapped model"):
        wrapped(x.requires_grad_())


def test_a_part_without_gradients_is_the_users() -> None:
    net, x = Checkpointed(), images()
    net.frozen = True
    wrapped = racecar.wrap(net, 0.1, variant="local", example=x)
    with torch.autograd.graph.save_on_cpu():
        (wrapped(x).sum() + wrapped.reverse_loss).backward()
    assert wrapped.reverse_losses["conv2"] > 0 and net.conv1.weight.grad is not None


class Scripted(Switched):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.jit.script(nn.BatchNorm2d(4).double())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(F.relu(self.conv2(self.norm(self.conv1(x)))).flatten(1))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_part_does_no_harm() -> None:
    net, x = Scripted(), images()
    wrapped = racecar.wrap(net, 0.1, variant="local", example=x)
    assert net.norm.num_batches_tracked == 0 and (net.norm.running_mean == 0).all()
    (wrapped(x).sum() + wrapped.reverse_loss).backward()
    assert net.norm.num_batches_tracked == 1 and wrapped.plan.names == ["conv1", "linear"]
    assert [name for name, _ in wrapped.plan.left_out] == ["conv2"]  # nobody sees into a script


class Remembering(Switched):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = h = F.relu(self.conv1(x))
        return self.linear(F.relu(self.conv2(h)).flatten(1))


@pytest.mark.parametrize("how", ["traced", "run"])
def test_planning_leaves_no_attribute(how: str) -> None:
    net, x = Remembering(), images()
    wrapped = racecar.wrap(net, 0.1, example=x if how == "run" else None)
    assert how == "run" or not hasattr(net, "last")
    wrapped(x)
    assert isinstance(net.last, torch.Tensor)


class Auxiliary(Switched):
    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(4 * 36, 2).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.conv2(F.relu(self.conv1(x)))).flatten(1)
        return self.linear(h) + self.aux(h) if self.training else self.linear(h)


@pytest.mark.parametrize("how", ["traced", "run"])
def test_a_model_in_eval_mode_is_planned_as_it_trains(how: str) -> None:
    net, x = Auxiliary(), images()
    net.eval()
    net.conv1.train()
    wrapped = racecar.wrap(net, 0.1, example=x if how == "run" else None)
    assert [m.training for m in (net, net.conv1, net.conv2)] == [False, True, False]
    assert "aux" in wrapped.plan.names
    net.train()
    wrapped(x)
    assert wrapped.reverse_losses["aux"] > 0


def test_a_model_that_runs_in_eval_mode_alone_is_planned_in_it() -> None:
    net = nn.Module.__new__(Auxiliary)
    Auxiliary.__init__(net)
    net.norm = nn.BatchNorm1d(2).double()
    net.forward = lambda x: net.norm(net.linear(F.relu(net.conv2(F.relu(net.conv1(x)))).flatten(1)))
    net.eval()
    wrapped = racecar.wrap(net, 0.1, variant="local", example=images()[:1])  # batch norm over one value cannot train
    assert wrapped.plan.names == ["conv1", "conv2", "linear"]


@dataclass
class Features:
    inner: torch.Tensor
    out: torch.Tensor


class Plain:
    def __init__(self, inner: torch.Tensor, out: torch.Tensor) -> None:
        self.inner, self.out = inner, out


@pytest.mark.parametrize("kind", [Features, Plain])
def test_what_leaves_in_a_class_of_the_users_is_seen(kind: type) -> None:
    class Model(Switched):
        def forward(self, x: torch.Tensor) -> Features:
            h = F.relu(self.conv1(x))
            return kind(h, self.conv2(h))

    wrapped = racecar.wrap(Model(), 0.1, example=images())
    assert wrapped.plan.variant == "local" and "goes to" in str(wrapped.plan.obstacle)


def test_two_threads() -> None:
    net, x, found = Switched(), images(), []
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            go_on.wait(10)

    wrapped = racecar.wrap(net, 0.1)
    handle = net.conv2.register_forward_hook(wait)
    other = threading.Thread(target=lambda: found.append(wrapped(x)))
    other.start()
    assert inside.wait(10)
    try:
        with pytest.raises(RuntimeError, match=r"running in another thread.*deepcopy"):
            wrapped(x)
    finally:
        go_on.set()
        other.join()
        handle.remove()
    wrapped(x)
    assert len(found) == 1 and all(loss > 0 for loss in wrapped.reverse_losses.values())


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.features(x).mean((2, 3))


def test_the_mode_of_a_part_is_the_models() -> None:
    """As in any model: its norms may be in eval mode, and the reverse pass is there as long as the model trains."""
    net, x = Classifier(), torch.randn(2, 3, 6, 6)
    wrapped = racecar.wrap(net, 0.1, variant="full")
    net.features.eval()
    mean = net.features[1].running_mean.clone()
    wrapped(x)
    assert wrapped.reverse_loss > 0 and torch.equal(mean, net.features[1].running_mean)
    net.eval()
    net.features.train()
    wrapped(x)
    assert wrapped.reverse_loss == 0
    net.features(x)  # by itself, in its own mode
    assert wrapped.reverse_loss > 0


class OldNorms(nn.Module):
    def __init__(self, norm) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(4, 5).double(), norm(nn.Linear(5, 3).double())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x) + 1)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("how", ["traced", "run"])
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_weights_that_the_older_norms_compute(norm, how: str) -> None:
    """`torch.nn.utils.weight_norm` and `spectral_norm` set the weight by a hook before every forward."""
    net, x = OldNorms(norm), torch.randn(2, 4, dtype=torch.float64)
    wrapped = racecar.wrap(net, 1.0, variant="local", example=x if how == "run" else None)
    wrapped(x)
    d = net.one(x) + 1
    want = 0.5 * (d - (d @ net.two.weight.T) @ net.two.weight).square().sum()
    torch.testing.assert_close(wrapped.reverse_losses["two"], want.detach())
    wrapped.lam = [0.0, 1.0]
    wrapped(x)
    wrapped.reverse_loss.backward()
    own = net.two.weight_g if norm is nn.utils.weight_norm else net.two.weight_orig
    assert own.grad.abs().sum() > 0


class Noisy(Switched):
    sigma = 0.1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(x)
        if self.sigma:
            h = h + self.sigma * torch.randn(h.shape, dtype=h.dtype)
        return self.linear(F.relu(self.conv2(F.relu(h))).flatten(1))


def test_noise_may_come_and_go() -> None:
    net, x = Noisy(), images()
    wrapped = racecar.wrap(net, 0.1, variant="local", example=x)
    wrapped(x)
    net.sigma = 0.0
    wrapped(x)
    assert all(loss > 0 for loss in wrapped.reverse_losses.values())


def test_a_checkpoint_around_what_is_not_compared_is_served() -> None:
    net, x = Checkpointed(), images().requires_grad_()
    net.reentrant = False
    twin, want = Switched(), []
    for model in (net, twin):
        wrapped = racecar.wrap(model, 0.1, variant="local", layers=1, example=x)
        (wrapped(x).sum() + wrapped.reverse_loss).backward()
        want.append(model.conv1.weight.grad)
    torch.testing.assert_close(*want)


class OwnCheckpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, x):
        with torch.no_grad():
            return run(x)


def test_a_checkpoint_of_another_library_is_refused() -> None:
    class Model(Checkpointed):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = OwnCheckpoint.apply(self.conv2, F.relu(self.conv1(x)))
            return self.linear(F.relu(h).flatten(1))

    x = images()
    wrapped = racecar.wrap(Model(), 0.1, variant="local", example=x)
    with pytest.raises(RuntimeError, match="checkpoint inside the model runs layer 'conv2'"):
        wrapped(x.requires_grad_())


def test_a_part_that_is_left_out_forgets_the_models_mode() -> None:
    class Skips(Classifier):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if len(x) == 0 else super().forward(x)

    net, x = Skips(), torch.randn(2, 3, 6, 6)
    wrapped = racecar.wrap(net, 0.1, variant="full", example=x)
    net.eval()
    wrapped(x[:0])
    net.train()
    net.features(x)
    assert wrapped.reverse_loss > 0
    wrapped(x[:0])
    net.eval()
    net.features(x)
    assert wrapped.reverse_loss == 0


def test_a_compiled_part_reconstructs() -> None:
    torch.compiler.reset()
    net, x = Classifier(), torch.randn(2, 3, 6, 6)
    wrapped = racecar.wrap(net, 0.1, variant="full")
    want = wrapped.reconstruct(x)
    net.features.compile(backend="eager")
    torch.testing.assert_close(wrapped.reconstruct(x), want)


class Collecting(Switched):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []
        self.cache: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if "ones" not in self.cache:
            self.cache["ones"] = torch.ones_like(x)
        h = F.relu(self.conv1(x * self.cache["ones"]))
        self.seen.append(h)
        return self.linear(F.relu(self.conv2(h)).flatten(1))


def test_planning_leaves_nothing_in_lists_and_dictionaries() -> None:
    net, x = Collecting(), images()
    seen, cache = net.seen, net.cache
    wrapped = racecar.wrap(net, 0.1)
    assert net.seen is seen and net.cache is cache and not seen and not cache
    wrapped(x)
    assert [type(t) for t in seen] == [torch.Tensor] and set(cache) == {"ones"}
