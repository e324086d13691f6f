"""Where the kept bytes are: every byte is counted once, and found at the layer and in the role that it has."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from racecar.bench import contestants, where
from racecar.bench.networks import NETWORKS, Network
from racecar.cli import app
from racecar.measure import kept_bytes
from racecar_kernels import extension

FLOAT = 4
BY_NAME = {c.name: c for c in contestants.CONTESTANTS}


def kept(network: Network, name: str, batch: int = 4) -> dict[tuple[int, str], int]:
    return {(r.layer, r.role): r.kept for r in where.kept_by_layer(network, BY_NAME[name], batch=batch, tiny=True)}


@pytest.mark.slow
@pytest.mark.parametrize("contestant", BY_NAME)
@pytest.mark.parametrize("name", ["mnist", "smoke", "mlp"])
def test_the_sum_is_what_is_kept(name, contestant):
    network = NETWORKS[name]
    torch.manual_seed(0)
    net, x = network.model(narrow=True), network.inputs(4, tiny=True)
    forward = BY_NAME[contestant].prepare(net, x, contestants.LAM)
    forward().backward()
    net.zero_grad()
    assert sum(kept(network, contestant).values()) == kept_bytes(forward, net.parameters())


def test_plain_training_by_hand():
    """Layer 1 gives 8 channels of 12x12, of which the pooling keeps a quarter, and as many places."""
    found = kept(NETWORKS["mnist"], "Std")
    pixels = 4 * 12 * 12
    assert found[1, where.INPUT] == pixels * FLOAT
    assert found[1, where.OUTPUT] == 8 * pixels * FLOAT
    assert found[2, where.POOLED] == 8 * pixels // 4 * FLOAT
    assert found[2, where.PLACES] == 8 * pixels // 4 * 8
    assert not any(role.startswith("reverse") for _, role in found)


def test_the_plain_reverse_pass_keeps_what_ours_does_not():
    plain, ours = (kept(NETWORKS["mnist"], f"{who}") for who in ("plain PyTorch, full", "ours, full, store"))
    pixels = 4 * 12 * 12
    assert plain[1, where.SOURCE] == 8 * pixels * FLOAT  # y - b at the full resolution
    assert plain[2, where.UNDONE] == 8 * pixels * FLOAT
    assert plain[2, where.BACK] == ours[2, where.COMES_BACK] == 8 * pixels // 4 * FLOAT
    assert not {role for _, role in ours} & {where.SOURCE, where.UNDONE, where.PLACES, where.POOLED, where.RESIDUAL}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "cifar", "smoke", "resnet110", "weather"])
def test_everything_is_recognised(name):
    network = NETWORKS[name]
    for contestant in ("plain PyTorch, local", "plain PyTorch, local, checkpoints", "ours, local, deferred"):
        assert (0, where.OTHER) not in kept(network, contestant)
    found = kept(network, "ours, local, store")
    assert (0, where.OTHER) not in found and any(role.startswith("reverse: ") for _, role in found)


def test_what_is_not_recognised_is_listed():
    def prepare(net, x, lam):
        hidden = []

        def forward():
            hidden[:] = [torch.rand(1000)]
            return contestants.task_loss(net(x))

        return forward

    hoarder = contestants.Contestant("hoarder", None, prepare)
    rows = where.kept_by_layer(NETWORKS["mlp"], hoarder, batch=4, tiny=True)
    assert sum(r.kept for r in rows if r.role == where.OTHER) >= 1000 * FLOAT


def test_norms_are_told_from_activations():
    found = kept(NETWORKS["cifar"], "Std")
    assert (
        (1, where.NORM_INPUT) in found and found[1, where.STATISTICS] == 2 * 8 * FLOAT and found[0, where.BUFFERS] > 0
    )
    weather = kept(NETWORKS["weather"], "plain PyTorch, local")
    assert {(2, where.PADDED), (2, where.BACK_PADDED), (2, where.PRE_ACTIVATION), (2, where.NORM_INPUT)} <= set(weather)


def test_layers_are_named_after_their_operations():
    assert where.layer_names(NETWORKS["mlp"].model())[:2] == ["1 Linear 12->10", "2 Linear 10->7"]
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU())
    assert where.layer_names(net) == ["1 Conv2d 1->3"]


def test_the_command_fills_in_a_page_and_draws(tmp_path):
    page, picture = tmp_path / "page.md", tmp_path / "where.svg"
    page.write_text("<!-- where:begin -->\nold\n<!-- where:end -->\n")
    words = ["bench", "--where", "mnist", "resnet110", "--quick", "--markdown", str(page), "--plot", str(picture)]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "300"})
    assert done.exit_code == 0, done.output
    assert "MNIST (3 conv), 28x28, batch 2: kB kept for the backward pass\nlayer" in done.output
    text = page.read_text()
    assert "old" not in text and "| Std | plain PyTorch, full | ours, full, store |" in text
    assert "| Std | plain PyTorch, local | ours, local, store | ours, local, deferred |" in text
    assert "| 1 Conv2d 1->8 | input |" in text and "| all |  |" in text
    assert "<svg" in picture.read_text()


@pytest.mark.skipif(extension.load() is None, reason="the extension is not built")
@pytest.mark.parametrize("batch", [4, 200])
@pytest.mark.parametrize("variant", ["full", "local"])
def test_what_a_chain_of_narrow_layers_keeps_in_one_tensor_is_recognised(variant, batch):
    """12-10-7-5-4-3-2, block by block of rows: what five layers gave, and what came back to all six."""
    found = kept(NETWORKS["mlp"], f"ours, {variant}, store", batch)
    assert found[0, where.EVERY_D] == batch * (10 + 7 + 5 + 4 + 3) * FLOAT
    assert found[0, where.EVERY_A] == batch * (12 + 10 + 7 + 5 + 4 + 3) * FLOAT
    assert (0, where.OTHER) not in found
    assert where.EVERY_D not in {role for _, role in kept(NETWORKS["mlp"], "Std", batch)}
