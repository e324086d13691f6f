"""What trainers do with a model, done with a wrapped one: scaled losses, checkpoints, averages, compiled training."""

from __future__ import annotations

import copy
import io
import statistics
from collections.abc import Callable

import oracle
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import racecar

POLICIES = [("full", "store"), ("full", "recompute"), ("local", "store"), ("local", "recompute"), ("local", "deferred")]
each_policy = pytest.mark.parametrize(("variant", "memory"), POLICIES)


def plain(norm: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(4)] * norm
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), *norms, nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 3), nn.Tanh()
    ).double()


def images(count: int = 4) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(count, 2, 10, 10, dtype=torch.float64)


def gradients(net: nn.Module, loss: Tensor) -> list[Tensor]:
    net.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in net.parameters()]


def step_of(net: nn.Module, x: Tensor) -> list[Tensor]:
    return gradients(net, net(x).square().sum() + net.reverse_loss)


# ------------------------------------------------------------------------------------------- mixed precision


def scaled(net: nn.Sequential, loss: Tensor) -> list[Tensor]:
    """Gradients by way of a scaled loss, as mixed precision in float16 needs them."""
    net.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)
    scaler.scale(loss).backward()
    scaler.unscale_(torch.optim.SGD(net.parameters(), 0.1))
    return [p.grad.clone() for p in net.parameters()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("variant", ["full", "local"])
def test_scaled_losses_under_autocast(variant: str, dtype: torch.dtype) -> None:
    """Norm-wise error of the gradients against float64, median of nine seeds: at most twice plain PyTorch's."""

    def losses(net: nn.Sequential, x: Tensor) -> Tensor:
        return sum(oracle.chain_losses([([], net[0], [net[1]]), ([net[2]], net[3], [net[4]])], x, variant=variant))

    ours, theirs = [], []
    for seed in range(9):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 3, padding=1), nn.Tanh()
        )
        x = torch.randn(4, 2, 8, 8)
        exact = copy.deepcopy(net).double()
        want = gradients(exact, losses(exact, x.double()))
        with torch.autocast("cpu", dtype):
            loss = losses(net, x)
        theirs.append(oracle.error(scaled(net, loss.float()), want))
        wrapped = racecar.wrap(net, 1.0, variant=variant)
        with torch.autocast("cpu", dtype):
            wrapped(x)
        ours.append(oracle.error(scaled(wrapped, wrapped.reverse_loss), want))
    assert statistics.median(ours) <= 2 * statistics.median(theirs)


@each_policy
def test_a_scaler_skips_a_step_that_overflows(variant: str, memory: str) -> None:
    """With λ so large that the scaled loss is infinite; then the scale shrinks until it is not."""
    net = racecar.wrap(plain().float(), 1.0, variant=variant, memory=memory)
    optimizer = torch.optim.SGD(net.parameters(), 1e-6)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-60)
    before = net[0].weight.detach().clone()
    unchanged = []
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(images().float()).float().square().mean() + net.reverse_loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        unchanged.append(torch.equal(before, net[0].weight))
    assert unchanged == [True, False, False] and net[0].weight.isfinite().all()


@each_policy
def test_channels_last_is_kept(variant: str, memory: str) -> None:
    last = torch.channels_last
    net = racecar.wrap(plain().to(memory_format=last), 0.1, variant=variant, memory=memory)
    x = images().contiguous(memory_format=last).requires_grad_()
    out = net(x)
    (out.square().sum() + net.reverse_loss).backward()
    back = net.reconstruct(x)
    for t in (out, back, x.grad, net[0].weight, net[0].weight.grad, net[4].weight.grad):
        assert t.is_contiguous(memory_format=last) and not t.is_contiguous()


# ------------------------------------------------------------------------------------------- checkpoints, accumulation


@pytest.mark.parametrize("watched", [False, True], ids=["one node", "layer by layer"])
@each_policy
def test_activation_checkpoint_around_a_wrapped_part(variant: str, memory: str, watched: bool) -> None:
    net, x = racecar.wrap(plain(), 0.1, variant=variant, memory=memory), images()
    want = step_of(net, x)
    value, losses = net.reverse_loss.detach(), net.reverse_losses
    if watched:
        net[0].register_forward_hook(lambda *_: None)
    out = checkpoint(net, x, use_reentrant=False)
    loss = out.square().sum() + net.reverse_loss
    torch.testing.assert_close(gradients(net, loss), want)
    # the forward that ran again in the backward pass has not taken the place of the one that counts
    torch.testing.assert_close(net.reverse_loss.detach(), value)
    torch.testing.assert_close(net.reverse_losses, losses)
    torch.testing.assert_close(step_of(net, x), want)


@each_policy
def test_a_reentrant_checkpoint_is_refused(variant: str, memory: str) -> None:
    net = racecar.wrap(plain(), 0.1, variant=variant, memory=memory)
    out = checkpoint(net, images().requires_grad_(), use_reentrant=True)
    with pytest.raises(RuntimeError, match="no gradient under a reentrant activation checkpoint.*use_reentrant=False"):
        (out.square().sum() + net.reverse_loss).backward()
    step_of(net, images())


def test_a_reentrant_checkpoint_without_a_reverse_pass_is_fine() -> None:
    net, x = racecar.wrap(plain(), 0.0), images()
    want = step_of(net, x)
    out = checkpoint(net, x.requires_grad_(), use_reentrant=True)
    torch.testing.assert_close(gradients(net, out.square().sum() + net.reverse_loss), want)


@each_policy
def test_accumulated_gradients(variant: str, memory: str) -> None:
    """`l2` is a sum, of which every part of the batch adds its own; for `mean` the parts are averaged."""
    for reduction, share in (("l2", 1.0), ("mean", 0.5)):
        net = racecar.wrap(plain(norm=False), 0.1, variant=variant, memory=memory, reduction=reduction)
        net(images())
        want = gradients(net, net.reverse_loss)
        net.zero_grad()
        for x in images().chunk(2):
            net(x)
            (share * net.reverse_loss).backward()
        torch.testing.assert_close([p.grad for p in net.parameters()], want)


# ------------------------------------------------------------------------------------------- parameters


@each_policy
def test_functional_call(variant: str, memory: str) -> None:
    net, other = racecar.wrap(plain(), 0.1, variant=variant, memory=memory), plain()
    given = {name: (p.detach() * 1.5).requires_grad_() for name, p in net.named_parameters()}
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    out = torch.func.functional_call(net, (given, buffers), (images(),))
    loss = out.square().sum() + net.reverse_loss
    got = torch.autograd.grad(loss, list(given.values()))
    assert all(p.grad is None for p in net.parameters()) and net[1].num_batches_tracked == 0
    with torch.no_grad():
        for p in other.parameters():
            p *= 1.5
    other = racecar.wrap(other, 0.1, variant=variant, memory=memory)
    torch.testing.assert_close(list(got), step_of(other, images()))
    torch.testing.assert_close(buffers, dict(other.named_buffers()))


def test_weights_go_to_files_and_back(tmp_path) -> None:
    """With the plain model's keys, into a wrapped model or a plain one."""
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    net = racecar.wrap(plain(), 0.1)
    step_of(net, images())
    assert list(net.state_dict()) == list(plain().state_dict())
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    safetensors.save_file(net.state_dict(), tmp_path / "weights.safetensors")
    safetensors.save_model(net, str(tmp_path / "model.safetensors"))
    with torch.no_grad():
        want = net.eval()(images())

    def renewed() -> nn.Sequential:
        other = plain()
        with torch.no_grad():
            for p in other.parameters():
                p.fill_(float("nan"))
        return other

    from_pickle, from_file, from_model = renewed(), racecar.wrap(renewed(), 0.1), racecar.wrap(renewed(), 0.1)
    from_pickle.load_state_dict(torch.load(buffer, weights_only=True))
    from_file.load_state_dict(safetensors.load_file(tmp_path / "weights.safetensors"))
    safetensors.load_model(from_model, str(tmp_path / "model.safetensors"))
    for other in (from_pickle, from_file, from_model):
        torch.testing.assert_close(other.eval()(images()), want)


@each_policy
def test_moving_averages(variant: str, memory: str) -> None:
    net = racecar.wrap(plain(), 0.1, variant=variant, memory=memory)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.75), use_buffers=False)
    want = None
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        (net(images()).square().sum() + net.reverse_loss).backward()
        optimizer.step()
        average.update_parameters(net)
        now = net[0].weight.detach().clone()
        want = now if want is None else torch.lerp(want, now, 0.25)
    torch.testing.assert_close(average.module[0].weight.detach(), want)
    assert average.module.lam == net.lam
    model = average.module.unwrap()
    assert type(model) is nn.Sequential and net.plan  # the trained one is still wrapped
    step_of(net, images())


PARAMETRIZATIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
@each_policy
def test_parametrised_weights(variant: str, memory: str, name: str) -> None:
    """Loss and gradients of what stands behind the weight are those of the definition."""
    torch.manual_seed(0)
    first, second = (PARAMETRIZATIONS[name](op) for op in (nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 3)))
    net = nn.Sequential(first, nn.Tanh(), second, nn.Tanh()).double()
    exact = copy.deepcopy(net)
    with parametrize.cached():
        layers = [([], exact[0], [exact[1]]), ([], exact[2], [exact[3]])]
        want = gradients(exact, 0.1 * sum(oracle.chain_losses(layers, images(), variant=variant)))
    net = racecar.wrap(net, 0.1, variant=variant, memory=memory)
    net(images())
    torch.testing.assert_close(gradients(net, net.reverse_loss), want)


# ------------------------------------------------------------------------------------------- compiled training


@each_policy
def test_compiled_training_never_recompiles(variant: str, memory: str) -> None:
    """Batch norm's buffers, an optimiser's steps and a new λ at every step; parameters are those of eager training."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    found = []
    for compiled in (False, True):
        net = racecar.wrap(plain(), 0.1, variant=variant, memory=memory)
        optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9)

        def step(x: Tensor, net: nn.Module = net) -> Tensor:
            return net(x).square().mean() + net.reverse_loss

        run = torch.compile(step, fullgraph=True, backend=counter) if compiled else step
        for i in range(4):
            net.lam = 0.1 / (i + 1)
            optimizer.zero_grad()
            run(images()).backward()
            optimizer.step()
        found.append(dict(net.state_dict()))
    assert counter.frame_count == 1
    torch.testing.assert_close(*found)


@each_policy
def test_a_compiled_model_keeps_its_face(variant: str, memory: str) -> None:
    """`torch.compile(net)` itself, and the reverse loss read outside of what is compiled."""
    torch.compiler.reset()
    net, x = racecar.wrap(plain(), 0.1, variant=variant, memory=memory), images()
    want = step_of(net, x)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    out = compiled(x)
    torch.testing.assert_close(gradients(net, out.square().sum() + net.reverse_loss), want)
    assert list(net.reverse_losses) == ["0", "4"] and len(compiled.lam) == 2
