"""The benchmark: its networks, the plain reverse passes it takes as baselines, its check of gradients, its figures."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from racecar.bench import checkpointed, contestants, gradients, least, machine, plain, residual, steps, tables
from racecar.bench.networks import NETWORKS

CONTRACT = Path(__file__).resolve().parents[2] / "shared" / "contract"
PLAIN = contestants.CONTESTANTS[:3]


def layers_of(net):
    """Of all the parts that run backwards."""
    return [layer for part in residual.parts_of(net) for layer in plain.layers_of(part.chain(net))]


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_chains_or_parts_in_channels_last(name):
    network = NETWORKS[name]
    net, x = network.model(narrow=True), network.inputs(2, tiny=True)
    assert isinstance(net, nn.Sequential) or network.variants == ("local",)
    assert len(layers_of(net)) >= 3
    if x.dim() == 4:
        assert net(x).is_contiguous(memory_format=torch.channels_last)
    assert network.inputs(3).shape == (3, *network.sample)


def test_networks_have_the_size_of_the_papers_networks():
    models = {name: network.model() for name, network in NETWORKS.items()}
    convolutions = {name: len(layers_of(net)) for name, net in models.items()}
    assert convolutions == {
        "mnist": 3, "cifar": 13, "resnet110": 109, "vgg19": 16, "smoke": 4, "weather": 40, "mlp": 6
    }  # fmt: skip
    parameters = {name: sum(p.numel() for p in net.parameters()) for name, net in models.items()}
    assert parameters["mlp"] == 294
    # 1.73 million with the head (He et al. 2016, Table 6), which has 64 * 10 + 10
    assert parameters["resnet110"] == 1_727_962 - 650
    assert len(models["weather"].blocks) == 19 and models["weather"].stem[0].kernel_size == (7, 7)


def test_every_operation_of_a_residual_network_runs_backwards():
    """The parts together are all of it, and the network's own forward is what they compute."""
    for name in ("resnet110", "weather"):
        net = NETWORKS[name].model(narrow=True)
        assert len(layers_of(net)) == sum(isinstance(module, nn.Conv2d) for module in net.modules())


def test_a_block_that_halves_the_image_pads_its_shortcut_with_zero_channels():
    block = residual.ResidualBlock(2, 4).eval()
    for p in block.branch.parameters():
        nn.init.zeros_(p)
    x = torch.rand(1, 2, 4, 4)
    out = block(x)
    assert torch.equal(out[:, :2], x[:, :, ::2, ::2]) and not out[:, 2:].any()


def test_a_network_that_names_no_parts_is_refused():
    with pytest.raises(TypeError, match="an nn.Sequential or names its parts, got Linear"):
        residual.parts_of(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("name", "ratio"), [("mnist", 1.46), ("cifar", 1.73), ("vgg19", 1.79)], ids=["mnist", "cifar", "vgg19"]
)
def test_fewest_multiplications_of_a_full_reverse(name, ratio):
    """The figures of the design, found there by hand."""
    network = NETWORKS[name]
    assert round(least.least_ratio(network.model(), network.inputs(2), "full"), 2) == ratio


def test_fewest_multiplications_by_hand():
    """Two layers, 4x4 and 2x2 pixels, 3x3 kernels, 1 -> 2 -> 3 channels: plain 3 (288 + 216) - 288, as counted out."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 3, 3, padding=1))
    x = torch.randn(5, 1, 4, 4)
    first, second, stay = 16 * 18, 4 * 54, 3 * (288 + 216) - 288
    assert least.least_ratio(net, x, "local") == pytest.approx((stay + 3 * (first + second)) / stay)
    strided = 4 * 2 * 4 * 4  # from each of 4 small pixels and 2 channels, a 4x4 kernel
    assert least.least_ratio(net, x, "full") == pytest.approx((stay + 3 * (strided + second)) / stay)


def test_fewest_multiplications_of_linear_layers_and_up_sampling():
    linear = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5))
    plain_cost = 3 * (12 + 20) - 12
    ratio = least.least_ratio(linear, torch.randn(2, 3), "full")
    assert ratio == pytest.approx((plain_cost + 3 * 32) / plain_cost)
    upwards = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(1, 1, 3, padding=1))
    big, small = 64 * 9, 16 * 16  # the forward alone folds: the reverse ends at the large side
    assert least.least_ratio(upwards, torch.randn(2, 1, 4, 4), "full") == pytest.approx(
        (2 * small + 3 * big) / (2 * big)
    )


OPERATIONS = [
    (nn.Linear(5, 3), (2, 5)),
    (nn.Conv2d(2, 3, 3, padding=1), (2, 2, 5, 5)),
    (nn.Conv2d(4, 6, 3, stride=2, dilation=2, groups=2, bias=False), (2, 4, 10, 9)),
    (nn.Conv1d(2, 3, 4, stride=3), (2, 2, 12)),
    (nn.Conv3d(1, 2, 3, stride=(2, 1, 1), padding=1), (2, 1, 6, 4, 4)),
    (nn.Conv2d(2, 3, (3, 7), padding=(1, 3), padding_mode="circular"), (2, 2, 5, 8)),
]


@pytest.mark.parametrize(("op", "shape"), OPERATIONS, ids=lambda v: type(v).__name__)
def test_plain_transposed_operation_is_the_adjoint(op, shape):
    """Against autograd's own adjoint of the operation."""
    op = copy.deepcopy(op).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    out = op(x)
    y = torch.randn_like(out)
    shifted = y if op.bias is None else y - op.bias.view(-1, *[1] * (y.dim() - 2))
    (wanted,) = torch.autograd.grad(out, x, shifted)
    torch.testing.assert_close(plain.transposed(op, y, x.shape), wanted)


def test_plain_reverse_pass_by_hand():
    """One linear layer: loss_1 = 1/2 sum (x - W^T(y - b))^2 in both variants."""
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    x = torch.randn(4, 3)
    y, losses = plain.forward_and_losses(net, x, "full")
    wanted = (x - (y - net[0].bias) @ net[0].weight).square().sum() / 2
    torch.testing.assert_close(torch.stack(losses), wanted[None])


@pytest.mark.skipif(not CONTRACT.is_dir(), reason="the contract's oracle is not beside this checkout")
@pytest.mark.parametrize("variant", ["full", "local"])
@pytest.mark.parametrize("name", ["mlp", "mnist_cnn", "batch_norm_cnn", "mixed_cnn", "smoke_generator", "strided_cnn"])
@pytest.mark.parametrize("written", [plain, checkpointed], ids=["eager", "checkpoints"])
def test_plain_reverse_pass_matches_brute_force(name, variant, written, monkeypatch):
    monkeypatch.syspath_prepend(str(CONTRACT))
    import brute_force
    import nets

    torch.manual_seed(0)
    net, x = getattr(nets, name)()
    net, x = net.double(), x.double().requires_grad_()
    other = copy.deepcopy(net)
    losses = written.forward_and_losses(net, x, variant)[1]
    wanted = brute_force.reverse_losses(other, x, variant=variant)
    torch.testing.assert_close(losses, wanted)
    got = torch.autograd.grad(sum(losses), [*net.parameters(), x])
    torch.testing.assert_close(got, torch.autograd.grad(sum(wanted), [*other.parameters(), x]))


@pytest.mark.parametrize(
    ("net", "shape", "message"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 3, padding="same"), nn.ReLU()), (1, 1, 4, 4), "numeric zero padding"),
        (nn.Sequential(nn.MaxPool2d(3, 2), nn.Conv2d(1, 2, 1)), (1, 1, 7, 7), "pooling that tiles its input"),
        (nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(1, 2, 1)), (1, 1, 4, 4), "nearest"),
        (nn.Sequential(nn.ReLU(), nn.Linear(4, 2)), (1, 4), "ReLU does not follow"),
        (nn.Sequential(nn.Conv2d(1, 2, 3, padding_mode="circular")), (1, 1, 4, 4), "where it keeps the size"),
    ],
    ids=["padding", "pooling", "up-sampling", "order", "circular"],
)
def test_plain_reverse_pass_refuses_what_it_does_not_serve(net, shape, message):
    with pytest.raises(NotImplementedError, match=message):
        plain.forward_and_losses(net, torch.randn(shape), "full")


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_every_contestant_has_the_right_gradients(name):
    assert gradients.check_gradients(NETWORKS[name], contestants.CONTESTANTS, narrow=True) == {}


def of_plain(change):
    """A contestant that differs from the plain full reverse pass by what `change` makes of network and loss."""

    def prepare(net, x, lam):
        forward = PLAIN[1].prepare(net, x, lam)
        return lambda: change(net, forward())

    return contestants.Contestant("wrong", "full", prepare)


def test_a_wrong_gradient_stops_the_measurement():
    wrong = of_plain(lambda net, loss: loss + 1e-9 * net[0].weight.square().sum())
    with pytest.raises(gradients.WrongGradientError, match=r"wrong on MNIST.*float64; no figure is reported"):
        steps.measure_network(NETWORKS["mnist"], [wrong], batch=2, tiny=True, rounds=1)


def test_a_gradient_that_is_only_right_in_float64_stops_it_too():
    def change(net, loss):
        single = loss.dtype == torch.float32
        return loss * (1 + 3e-6) if single else loss

    with pytest.raises(gradients.WrongGradientError, match=r"wrong on MNIST.*float32 gradient is off by 3\.\de-06"):
        gradients.check_gradients(NETWORKS["mnist"], [of_plain(change)], narrow=True)


def test_who_cannot_run_is_named_with_the_reason_and_the_others_are_measured():
    def refuse(net, x, lam):
        raise contestants.CannotRunError("no such instruction")

    lame = contestants.Contestant("lame", "local", refuse)
    measured = steps.measure_network(NETWORKS["mlp"], [lame, PLAIN[2]], batch=2, tiny=True, rounds=1, warmup=0)
    assert measured.skipped == {"lame": "no such instruction"}
    assert [r.contestant for r in measured.results] == ["Std", "plain PyTorch, local"]
    assert "lame: not measured, no such instruction" in tables.table(measured)


def test_who_cannot_run_at_full_size_is_left_out_as_well():
    def refuse(net, x, lam):
        if lam == contestants.LAM and x.dtype == torch.float32:
            raise contestants.CannotRunError("too large")
        return PLAIN[2].prepare(net, x, lam)

    late = contestants.Contestant("late", "local", refuse)
    measured = steps.measure_network(NETWORKS["mlp"], [late], batch=2, tiny=True, rounds=1, warmup=0)
    assert measured.skipped == {"late": "too large"} and len(measured.results) == 1


@pytest.mark.parametrize("name", ["mnist", "smoke", "weather"])
def test_the_plain_reverse_pass_is_one_graph_for_the_compiler(name, monkeypatch):
    """Traced in whole and run without code generation, which takes minutes."""
    real = torch.compile

    def traced(run, *, fullgraph, dynamic, options):
        return real(run, backend="eager", fullgraph=fullgraph, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", traced)
    torch.compiler.reset()
    compiled = [c for c in contestants.COMPILED if c.variant in NETWORKS[name].variants]
    assert gradients.check_gradients(NETWORKS[name], compiled, narrow=True, single=False) == {}


@pytest.mark.slow
def test_the_compiled_plain_reverse_pass_has_the_right_gradients():
    torch.compiler.reset()
    skipped = gradients.check_gradients(NETWORKS["mlp"], contestants.COMPILED[:1], narrow=True)
    assert skipped == {} or "compiler" in str(skipped)  # a machine may have none


def test_what_the_compiler_refuses_is_a_reason_not_to_run(monkeypatch):
    def broken(run, **_):
        def call():
            raise torch._dynamo.exc.BackendCompilerFailed(str, RuntimeError("no C++ compiler found"), None)

        return call

    monkeypatch.setattr(torch, "compile", broken)
    skipped = gradients.check_gradients(NETWORKS["mlp"], contestants.COMPILED, narrow=True)
    assert set(skipped) == {c.name for c in contestants.COMPILED}
    assert all(reason.startswith("torch.compile: ") and "\n" not in reason for reason in skipped.values())


def test_backends_are_forced_by_name():
    found = contestants.contestants(backends=["reference"], containing="ours, full, store")
    assert [c.name for c in found] == ["Std", "ours, full, store", "ours, full, store, reference"]
    assert gradients.check_gradients(NETWORKS["mlp"], found, narrow=True) == {}
    with pytest.raises(ValueError, match="no backend is named abacus; there are cpp, triton, reference"):
        contestants.contestants(backends=["abacus"])


def test_a_backend_that_cannot_serve_says_why(monkeypatch):
    import racecar

    def refuse(*_, **settings):
        raise ValueError(f"backend {settings['backend']!r} cannot serve this layer: it is tired")

    monkeypatch.setattr(racecar, "wrap", refuse)
    found = contestants.contestants(backends=["reference"], containing="local, deferred, reference")
    skipped = gradients.check_gradients(NETWORKS["mlp"], found, narrow=True)
    assert skipped == {"ours, local, deferred, reference": "backend 'reference' cannot serve this layer: it is tired"}


def test_checkpoints_keep_less_than_the_plain_reverse_pass():
    results = steps.measure_network(
        NETWORKS["mnist"], [*PLAIN[1:], *contestants.CHECKPOINTED], batch=2, tiny=True, rounds=1, warmup=0
    )
    for variant in ("full", "local"):
        eager, again = (results.of(f"plain PyTorch, {variant}{end}") for end in ("", ", checkpoints"))
        assert again.kept < 0.5 * eager.kept


def test_measured_ratios_of_the_plain_reverse_pass():
    measured = steps.measure_network(NETWORKS["mnist"], PLAIN[1:], batch=2, tiny=True, rounds=2, warmup=1)
    std, full, local = measured.results
    assert (std.contestant, std.kept_ratio, std.peak_ratio, std.time_ratio.median) == ("Std", 1.0, 1.0, 1.0)
    assert 2.0 < full.kept_ratio < 2.6 and 2.0 < local.kept_ratio < 2.6
    assert full.time.median > 0 and full.peak > full.kept > 0
    assert std.least is None and 1.0 < full.least < local.least < 2.2
    text = tables.table(measured)
    assert text.startswith("MNIST") and all(r.contestant in text for r in measured.results)
    assert steps.Measured.from_json(json.loads(json.dumps(measured.as_json()))) == measured


@pytest.mark.parametrize("name", ["mnist", "weather"])
def test_networks_are_measured_in_bfloat16_too(name):
    measured = steps.measure_network(
        NETWORKS[name], PLAIN[2:], batch=2, tiny=True, rounds=1, warmup=0, dtype=torch.bfloat16
    )
    assert [r.contestant for r in measured.results] == ["Std", "plain PyTorch, local"]


def test_a_variant_that_a_network_does_not_have_is_left_out():
    measured = steps.measure_network(NETWORKS["resnet110"], PLAIN[1:], batch=2, tiny=True, rounds=1, warmup=0)
    assert [r.contestant for r in measured.results] == ["Std", "plain PyTorch, local"]


def test_measuring_needs_nothing_but_pytorch():
    """A GPU machine has no more than that; terminal and plots need other packages."""
    code = "import sys; import racecar.bench.steps as s; print({'rich', 'typer', 'matplotlib'} & set(sys.modules))"
    paths = [str(machine.ROOT / "python"), str(machine.ROOT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=100)
    assert done.stdout.strip() == "set()", done.stderr


def test_an_installed_package_names_no_commit(tmp_path, monkeypatch):
    """Around it there may be a repository of something else."""
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.commit() == "unknown" and machine.sources()


def test_machine_facts_are_complete_and_anonymous():
    facts = machine.facts()
    assert facts["device"] == "cpu" and facts["threads"] >= 1 and facts["processor"]
    assert "node" not in facts and "hostname" not in facts
    assert machine.commit()
