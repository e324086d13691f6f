"""The benchmark: its networks, the plain reverse pass it takes as baseline, and what it prints and writes."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from bench import contestants, machine, plain, steps
from bench.__main__ import main
from bench.networks import NETWORKS

CONTRACT = Path(__file__).resolve().parents[2] / "shared" / "contract"
PLAIN = contestants.CONTESTANTS[:3]


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_chains_in_channels_last(name):
    network = NETWORKS[name]
    net, x = network.model(narrow=True), network.inputs(2, tiny=True)
    assert isinstance(net, nn.Sequential) and len(plain.layers_of(net)) >= 3
    if x.dim() == 4:
        assert net(x).is_contiguous(memory_format=torch.channels_last)
    assert network.inputs(3).shape == (3, *network.sample)


def test_networks_have_the_size_of_the_papers_networks():
    convolutions = {name: len(plain.layers_of(NETWORKS[name].model())) for name in NETWORKS}
    assert convolutions == {"mnist": 3, "cifar": 13, "vgg19": 16, "smoke": 4, "mlp": 6}
    assert sum(p.numel() for p in NETWORKS["mlp"].model().parameters()) == 294


OPERATIONS = [
    (nn.Linear(5, 3), (2, 5)),
    (nn.Conv2d(2, 3, 3, padding=1), (2, 2, 5, 5)),
    (nn.Conv2d(4, 6, 3, stride=2, dilation=2, groups=2, bias=False), (2, 4, 10, 9)),
    (nn.Conv1d(2, 3, 4, stride=3), (2, 2, 12)),
    (nn.Conv3d(1, 2, 3, stride=(2, 1, 1), padding=1), (2, 1, 6, 4, 4)),
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
def test_plain_reverse_pass_matches_brute_force(name, variant, monkeypatch):
    monkeypatch.syspath_prepend(str(CONTRACT))
    import brute_force
    import nets

    torch.manual_seed(0)
    net, x = getattr(nets, name)()
    net, x = net.double(), x.double().requires_grad_()
    other = copy.deepcopy(net)
    losses = plain.forward_and_losses(net, x, variant)[1]
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
    ],
    ids=["padding", "pooling", "up-sampling", "order"],
)
def test_plain_reverse_pass_refuses_what_it_does_not_serve(net, shape, message):
    with pytest.raises(NotImplementedError, match=message):
        plain.forward_and_losses(net, torch.randn(shape), "full")


@pytest.mark.parametrize("name", NETWORKS)
def test_every_contestant_has_the_right_gradients(name):
    contestants.check_gradients(NETWORKS[name], contestants.CONTESTANTS, narrow=True)


def test_a_wrong_gradient_stops_the_measurement():
    def prepare(net, x):
        forward = PLAIN[1].prepare(net, x)
        return lambda: forward() + 1e-9 * net[0].weight.square().sum()

    wrong = contestants.Contestant("wrong", "full", prepare)
    with pytest.raises(contestants.WrongGradientError, match=r"wrong on MNIST.*no figure is reported"):
        steps.measure_network(NETWORKS["mnist"], [wrong], batch=2, tiny=True, rounds=1)


def test_measured_ratios_of_the_plain_reverse_pass():
    results = steps.measure_network(NETWORKS["mnist"], PLAIN[1:], batch=2, tiny=True, rounds=2, warmup=1)
    std, full, local = results
    assert (std.contestant, std.kept_ratio, std.peak_ratio, std.time_ratio.median) == ("Std", 1.0, 1.0, 1.0)
    assert 2.0 < full.kept_ratio < 2.6 and 2.0 < local.kept_ratio < 2.6
    assert full.time.median > 0 and full.peak > full.kept > 0
    text = steps.table("a title", results)
    assert text.startswith("a title") and all(r.contestant in text for r in results)
    assert json.dumps([r.as_json() for r in results])


def test_command_line_prints_a_table_and_writes_json(tmp_path, capsys):
    target = tmp_path / "new" / "figures.json"
    assert main(["mnist", "--quick", "--contestants", "ours, local, deferred", "--json", str(target)]) == 0
    printed = capsys.readouterr().out
    assert "tiny input" in printed and "ours, local, deferred" in printed
    written = json.loads(target.read_text())
    assert written["machine"]["torch"] == torch.__version__ and written["quick"] is True
    assert [r["contestant"] for r in written["networks"]["mnist"]["results"]] == ["Std", "ours, local, deferred"]


def test_command_line_fills_in_a_marked_place(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- measured:begin by a command -->\nold\n<!-- measured:end -->\nafter\n")
    arguments = ["mlp", "--quick", "--contestants", "plain PyTorch, full", "--markdown", str(page)]
    assert main(arguments) == 0
    assert main(arguments) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- measured:begin by a command -->\n") and text.endswith("-->\nafter\n")
    assert "old" not in text and text.count("| plain PyTorch, full | ") == 1
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="needs one line that begins with"):
        main(arguments)


def test_command_line_names_the_networks_there_are(capsys):
    assert main(["resnet"]) == 2
    assert "no network is named resnet; there are mnist" in capsys.readouterr().err


def test_machine_facts_are_complete_and_anonymous():
    facts = machine.facts()
    assert facts["device"] == "cpu" and facts["threads"] >= 1 and facts["processor"]
    assert "node" not in facts and "hostname" not in facts
    assert machine.commit()
