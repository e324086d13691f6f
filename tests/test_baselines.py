"""Greedy autoencoders: every geometry, what a stage may change, and whether losses fall on real digits."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import racecar
from racecar.baselines import autoencoder_stages, greedy_autoencoder
from racecar.data import load_images
from racecar.plan import plan_chain

GEOMETRIES = {
    "linear chain": ((5, 9), lambda: [nn.Linear(9, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 3)]),
    "tokens": ((2, 5, 6), lambda: [nn.Linear(6, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 6)]),
    "flattened": ((4, 1, 3, 3), lambda: [nn.Flatten(), nn.Linear(9, 4), nn.Sigmoid()]),
    "conv1d": ((2, 3, 11), lambda: [nn.Conv1d(3, 4, 4, stride=3, padding=1), nn.ReLU(), nn.MaxPool1d(2), _conv1()]),
    "conv3d": ((2, 1, 5, 6, 4), lambda: [nn.Conv3d(1, 2, 3, stride=2, padding=1), nn.ELU(), nn.Conv3d(2, 3, 1)]),
    "stride 2, odd": (
        (2, 3, 7, 8),
        lambda: [nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 2, 2)],
    ),
    "stride beyond kernel": ((2, 2, 9, 8), lambda: [nn.Conv2d(2, 3, 2, stride=3)]),
    "dilated": ((2, 2, 9, 8), lambda: [nn.Conv2d(2, 3, 3, padding=2, dilation=(2, 3), stride=(1, 2))]),
    "grouped": ((2, 4, 6, 6), lambda: [nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6)]),
    "same, even": ((2, 2, 7, 6), lambda: [nn.Conv2d(2, 3, (4, 2), padding="same", dilation=(1, 3))]),
    "same, circular": ((2, 2, 7, 6), lambda: [nn.Conv2d(2, 3, 4, padding="same", padding_mode="circular")]),
    "reflected, strided": ((2, 2, 7, 6), lambda: [nn.Conv2d(2, 3, 3, 2, padding=1, padding_mode="reflect")]),
    "valid": ((2, 2, 7, 6), lambda: [nn.Conv2d(2, 3, 3, padding="valid")]),
    "wide padding": ((2, 2, 4, 4), lambda: [nn.Conv2d(2, 3, 1, padding=2, stride=2)]),
    "pooled, odd": (
        (2, 2, 9, 7),
        lambda: [_conv2(), nn.ReLU(), nn.MaxPool2d(2), _conv2(), nn.AvgPool2d(3, 2), _conv2()],
    ),
    "pooled with ceil": ((2, 2, 7, 7), lambda: [_conv2(), nn.MaxPool2d(3, 2, ceil_mode=True), _conv2()]),
    "up-sampled": (
        (2, 2, 3, 4),
        lambda: [nn.Upsample(scale_factor=2), _conv2(), nn.Upsample(scale_factor=3), _conv2()],
    ),
    "pooled, up-sampled": ((2, 2, 9, 7), lambda: [nn.MaxPool2d(2), nn.Upsample(scale_factor=2), _conv2()]),
    "norms": ((3, 2, 6, 6), lambda: [_conv2(), nn.BatchNorm2d(2), nn.PReLU(), _conv2(), nn.GroupNorm(2, 2), nn.SiLU()]),
    "in place": ((2, 2, 4, 4), lambda: [nn.Dropout(0.5, inplace=True), _conv2(), nn.ReLU(inplace=True), _conv2()]),
    "head left out": ((2, 2, 6, 6), lambda: [_conv2(), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, 3)]),
}


def _conv1() -> nn.Module:
    return nn.Conv1d(4, 2, 2)


def _conv2() -> nn.Module:
    return nn.Conv2d(2, 2, 3, padding=1)


def state_of(net: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in net.state_dict().items()}


def changed(net: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}


def digits(n: int = 256) -> Tensor:
    return load_images(limit=n).train_x


@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_stage_gives_the_shape_of_d(name: str) -> None:
    torch.manual_seed(0)
    shape, build = GEOMETRIES[name]
    net, x = nn.Sequential(*build()), torch.randn(shape)
    before, flags = state_of(net), [m.training for m in net.modules()]
    stages = autoencoder_stages(net, x)
    assert [m.training for m in net.modules()] == flags
    assert not changed(net, before)
    assert [stage.name for stage in stages] == plan_chain(net).names
    for stage in stages:
        stage.train()
        kept = x.clone()
        d = stage.received(x)
        assert stage(x).shape == d.shape
        stage.loss(x).backward()
        assert torch.equal(x, kept)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in stage.trained_parameters())
        mine = {id(p) for p in stage.trained_parameters()}
        assert all(p.grad is None for p in net.parameters() if id(p) not in mine)
        net.zero_grad()


def test_a_stage_follows_the_size_of_the_batch() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 3, 3))
    for stage in autoencoder_stages(net, torch.randn(2, 1, 16, 16)):
        for size in (12, 15, 17):
            assert (
                stage(torch.randn(3, 1, size, size + 1)).shape
                == stage.received(torch.randn(3, 1, size, size + 1)).shape
            )


def test_the_decoder_is_the_transposed_operation() -> None:
    """With the encoder's own weights in it, the decoder gives what autograd gives as the adjoint."""
    for kwargs in (
        dict(stride=2, padding=1),
        dict(padding="same"),
        dict(dilation=2, stride=3, padding=(3, 1), groups=2),
    ):
        conv = nn.Conv2d(2, 4, 4, bias=False, **kwargs).double()
        (stage,) = autoencoder_stages(nn.Sequential(conv), x := torch.randn(2, 2, 10, 11, dtype=torch.float64))
        stage.decoder.op.weight.data.copy_(conv.weight)
        nn.init.zeros_(stage.decoder.op.bias)
        y = conv(x.requires_grad_())
        (wanted,) = torch.autograd.grad(y, x, y)
        torch.testing.assert_close(stage(x), wanted)


def test_the_loss_is_the_mean_square_in_float32_or_wider() -> None:
    x = torch.randn(4, 6)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        (stage,) = autoencoder_stages(nn.Sequential(nn.Linear(6, 3), nn.Tanh()).to(dtype), x.to(dtype))
        wide = torch.promote_types(dtype, torch.float32)
        loss = stage.loss(x.to(dtype))
        assert loss.dtype == wide and loss.requires_grad
        torch.testing.assert_close(loss, (stage(x.to(dtype)).to(wide) - x.to(dtype).to(wide)).square().mean())
        assert {p.dtype for p in stage.parameters()} == {dtype}


def test_train_leaves_the_layers_below_alone() -> None:
    drop, relu = nn.Dropout(0.5), nn.ReLU()
    net = nn.Sequential(_conv2(), nn.BatchNorm2d(2), relu, drop, _conv2(), nn.BatchNorm2d(2), relu, drop, _conv2())
    x = torch.randn(4, 2, 5, 5)
    for m, stage in enumerate(autoencoder_stages(net, x)):
        for enter in (lambda s: s, lambda s: s.train()):  # a trainer that does not call train() is served too
            before = state_of(net)
            enter(stage)
            assert torch.equal(stage.received(x), stage.received(x))  # no dropout below
            stage.loss(x)
            assert not any(module.training for module in stage.prefix.modules())
            buffers = {key for key in changed(net, before) if "num_batches" not in key}
            assert buffers == ({"1.running_mean", "1.running_var"}, {"5.running_mean", "5.running_var"}, set())[m]
        assert drop.training or m == 0  # on in front of the operation that is trained


def test_what_prepares_the_input_gathers_its_statistics_in_the_first_stage() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    x = torch.randn(64, 3) * 5 + 2
    for stage, wanted in zip(autoencoder_stages(net, x), (True, False), strict=True):
        before = state_of(net)
        stage.train().loss(x)
        assert ("0.running_mean" in changed(net, before)) == wanted
        assert stage.eval().loss(x) == stage.loss(x)


def test_only_the_stage_changes_and_weights_are_untied() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    seen, before = {}, state_of(net)

    def progress(name: str, epoch: int, loss: float) -> None:
        seen[name, epoch] = (loss, changed(net, before))
        before.update(state_of(net))

    losses = greedy_autoencoder(net, [torch.randn(16, 8)], epochs=2, progress=progress)
    assert list(losses) == ["0", "2", "4"]
    for name in losses:
        assert losses[name] == [seen[name, 1][0], seen[name, 2][0]]
        assert seen[name, 1][1] == seen[name, 2][1] == {f"{name}.weight", f"{name}.bias"}
    stage = autoencoder_stages(net, torch.randn(2, 8))[0]
    assert not {p.data_ptr() for p in stage.decoder.parameters()} & {p.data_ptr() for p in net.parameters()}
    assert not torch.allclose(stage.decoder.op.weight, net[0].weight.T)


def test_losses_fall_on_digits() -> None:
    torch.manual_seed(0)
    x = digits()
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(), nn.Linear(192, 10),
    )  # fmt: skip
    head = state_of(net[9])
    losses = greedy_autoencoder(net, x.split(32), epochs=8, learning_rate=5e-3, seed=0)
    assert list(losses) == ["0", "5"]
    assert losses["0"][-1] < 0.1 * x.var() and losses["0"][-1] < 0.3 * losses["0"][0]
    assert losses["5"][-1] < 0.6 * losses["5"][0]
    assert not changed(net[9], head)


def test_a_linear_autoencoder_finds_the_subspace_of_low_rank_data() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 4) @ torch.randn(4, 12)
    losses = greedy_autoencoder(nn.Sequential(nn.Linear(12, 4)), [x], epochs=800, learning_rate=0.02, seed=0)
    assert losses["0"][-1] < 1e-3 * x.var()


def test_the_loss_of_an_epoch_is_the_mean_over_images() -> None:
    x = torch.randn(10, 5)
    net = nn.Sequential(nn.Linear(5, 5))
    frozen = partial(torch.optim.SGD, momentum=0.9)
    losses = greedy_autoencoder(net, [(x[:8], 0), (x[8:], 1)], epochs=1, learning_rate=1e-30, optimizer=frozen, seed=1)
    (stage,) = autoencoder_stages(net, x, seed=1)
    assert losses["0"] == pytest.approx([stage.loss(x).item()])


def test_a_seed_decides_everything_and_leaves_the_global_state_alone() -> None:
    start = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 4))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(20, 6)), 4, shuffle=True)
    runs = []
    for seed in (7, 7, 8):
        net, before = copy.deepcopy(start), torch.get_rng_state()
        runs.append((greedy_autoencoder(net, loader, epochs=2, seed=seed), state_of(net)))
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(3)
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1].values(), runs[1][1].values(), strict=True))

    def first(seed: int | None) -> Tensor:
        return autoencoder_stages(start, torch.randn(2, 6), seed=seed)[0].decoder.op.weight

    assert torch.equal(first(1), first(1)) and not torch.equal(first(None), first(None))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_flags_are_restored(error: type[BaseException]) -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2), nn.BatchNorm1d(2))
    net[1].eval()
    net[3].weight.requires_grad_(False)
    flags = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]
    frozen = net[3].weight.clone()

    def stop(name: str, epoch: int, loss: float) -> None:
        if name == "3":
            raise error("stop")

    with pytest.raises(error, match="stop"), torch.no_grad():  # trains all the same
        greedy_autoencoder(net, [torch.randn(8, 4)], epochs=1, progress=stop)
    assert ([m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]) == flags
    assert torch.equal(net[3].weight, frozen)
    assert all(p.grad is None for p in net.parameters())
    assert net(torch.randn(3, 4)).shape == (3, 2)


X = torch.randn(4, 3)
_twice = nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("model", "batches", "kwargs", "error", "says"),
    [
        (nn.Linear(3, 3), [X], {}, ValueError, "not a .nested. nn.Sequential"),
        (racecar.wrap(nn.Sequential(nn.Linear(3, 3)), 1.0), [X], {}, ValueError, "it is wrapped; call unwrap"),
        (
            nn.Sequential(racecar.wrap(nn.Sequential(nn.Linear(3, 3)), 1.0)),
            [X],
            {},
            ValueError,
            "its part '0' is wrapped",
        ),
        (nn.Sequential(_twice, nn.ReLU(), _twice), [X], {}, ValueError, "layers '0' and '2#2' share weights"),
        (nn.Sequential(nn.Linear(3, 3, dtype=torch.complex64)), [X], {}, TypeError, "complex64 weights"),
        ("net", [X], {}, TypeError, "must be an nn.Module, got str"),
        (nn.Sequential(nn.Linear(3, 2)), (x for x in [X]), {}, ValueError, "generator, which can be gone through only"),
        (nn.Sequential(nn.Linear(3, 2)), iter([X]), {}, ValueError, "only once; give a list or a data loader"),
        (nn.Sequential(nn.Linear(3, 2)), [], {}, ValueError, "batches is empty"),
        (nn.Sequential(nn.Linear(3, 2)), X, {}, TypeError, "x.split"),
        (nn.Sequential(nn.Linear(3, 2)), 3, {}, TypeError, "list or a data loader of inputs, got int"),
        (nn.Sequential(nn.Linear(3, 2)), [{"x": X}], {}, TypeError, "tuple .x, .... of which x is used, got dict"),
        (nn.Sequential(nn.Linear(3, 2)), [()], {}, TypeError, "got tuple"),
        (nn.Sequential(nn.Linear(4, 2)), [X], {}, ValueError, r"example \(4, 3\).*does not fit layer '0'"),
        (nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2)), [X], {}, ValueError, "does not fit layer '1'"),
        (nn.Sequential(nn.Linear(3, 2)), [X], dict(epochs=0), ValueError, "epochs must be at least 1, got 0"),
        (nn.Sequential(nn.Linear(3, 2)), [X], dict(epochs=1.0), TypeError, "whole number of at least 1, got 1.0"),
        (nn.Sequential(nn.Linear(3, 2)), [X], dict(learning_rate=0.0), ValueError, "positive and finite, got 0.0"),
        (nn.Sequential(nn.Linear(3, 2)), [X], dict(learning_rate=math.nan), ValueError, "positive and finite, got nan"),
        (nn.Sequential(nn.Linear(3, 2)), [X], dict(learning_rate="fast"), TypeError, "positive number, got 'fast'"),
    ],
    ids=lambda v: v if isinstance(v, str) else getattr(v, "__name__", type(v).__name__),
)
def test_greedy_refuses(model, batches, kwargs, error, says) -> None:
    before = state_of(model) if isinstance(model, nn.Module) else {}
    with pytest.raises(error, match=says):
        greedy_autoencoder(model, batches, **{"epochs": 1, **kwargs})
    if isinstance(model, nn.Module):
        assert not changed(model, before) and all(m.training for m in model.modules())


def test_the_example_must_be_a_tensor() -> None:
    with pytest.raises(TypeError, match="example must be a tensor.*got list"):
        autoencoder_stages(nn.Sequential(nn.Linear(3, 2)), [X])


def test_batches_that_dry_up_are_told() -> None:
    class Once:
        """Looks like something to iterate over again, and is not."""

        def __init__(self) -> None:
            self.left = iter([X, X])

        def __iter__(self):
            yield from self.left

    with pytest.raises(ValueError, match="batches gave nothing while layer '0' was trained"):
        greedy_autoencoder(nn.Sequential(nn.Linear(3, 2)), Once(), epochs=3)


def test_a_parametrised_layer_is_trained_through_its_parametrization() -> None:
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.ReLU(), nn.Linear(3, 2))
    before = state_of(net)
    greedy_autoencoder(net, [torch.randn(8, 4)], epochs=1, device="cpu")
    assert {k for k in changed(net, before) if k.startswith("0.parametrizations")}


@pytest.mark.gpu
def test_greedy_on_cuda() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(_conv2(), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.2), _conv2(), nn.Tanh())
    x, host = torch.randn(64, 2, 9, 9), copy.deepcopy(net)
    state = torch.cuda.get_rng_state()
    losses = greedy_autoencoder(net, x.split(16), epochs=3, seed=0, device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert net[0].weight.is_cuda and all(curve[-1] < curve[0] for curve in losses.values())
    on_host = greedy_autoencoder(host, x.split(16), epochs=3, seed=0)
    assert losses["0"] == pytest.approx(on_host["0"], rel=1e-2)
