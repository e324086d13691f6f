"""The check of the gradients runs the code that a measured step runs: where the input asks for no gradient."""

from __future__ import annotations

from operator import attrgetter

import pytest
import torch
from torch import Tensor, nn

from racecar.bench import contestants, gradients
from racecar.bench.networks import NETWORKS
from racecar_kernels import chain_backward, extension, pointwise

OURS = contestants.contestants(containing="ours")
WRONG = "whose input asks for no gradient: its gradient is off by .* in float64; no figure is reported"
called = attrgetter("name")


@pytest.mark.parametrize("name", ["mnist", "cifar", "vgg19", "smoke"])
def test_the_first_layer_of_what_is_checked_is_wide_enough_for_its_kernel(name):
    first = next(m for m in NETWORKS[name].checked().modules() if isinstance(m, nn.Conv2d))
    assert first.out_channels >= 16 and first.out_channels % 16 == 0
    assert first.weight[0].numel() <= pointwise.MOST_WEIGHTS


@pytest.mark.parametrize("contestant", OURS[1:], ids=called)
@pytest.mark.parametrize("name", ["mnist", "cifar", "vgg19"])
def test_a_first_layer_whose_gradient_is_doubled_is_found(name, contestant, monkeypatch):
    right = chain_backward.Backward.first_backward

    def doubled(self, *given):
        right(self, *given)
        self.weights[0] = self.weights[0] * 2

    monkeypatch.setattr(chain_backward.Backward, "first_backward", doubled)
    with pytest.raises(gradients.WrongGradientError, match=f"{contestant.name} on .*{WRONG}"):
        gradients.check_gradients(NETWORKS[name], [contestant], narrow=True, single=False)


@pytest.mark.skipif(extension.load() is None, reason="the extension is not built")
@pytest.mark.parametrize("contestant", [c for c in OURS if c.name.endswith(("full, store", "deferred"))], ids=called)
@pytest.mark.parametrize("only", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["mnist", "smoke"])
def test_a_kernel_that_is_wrong_is_found_in_either_type(name, only, contestant, replaced):
    """`grad_weight`, of networks without a norm behind the first layer."""
    calls = []

    def grad_weight(d, *given, **options):
        found = pointwise.grad_weight(d, *given, **options)
        if found is None or "sums" not in options:  # the first layer's alone: others run with any input
            return found
        calls.append(True)
        return found if d.x.dtype != only else (found[0] * (1 + 1e-4), found[1])

    replaced(grad_weight)
    says = WRONG if only == torch.float64 else "whose input asks for no gradient: its float32 gradient is off"
    with pytest.raises(gradients.WrongGradientError, match=says):
        gradients.check_gradients(NETWORKS[name], [contestant], narrow=True)
    assert calls and all(calls)


def test_what_is_compiled_is_checked_as_it_is_measured():
    assert gradients.ways(contestants.COMPILED[0]) == (False,)
    assert all(gradients.ways(c) == (True, False) for c in contestants.CONTESTANTS)


def test_what_serves_no_float64_is_judged_in_float32_alone():
    def judged(scale: float, **how: bool) -> dict[str, str]:
        plain = contestants.REFERENCES[0]

        def prepare(net: nn.Module, x: Tensor, lam: float) -> contestants.Forward:
            forward = plain.prepare(net, x, lam)

            def run() -> Tensor:
                if x.dtype == torch.float64:
                    raise AssertionError("it was asked for float64")
                return forward() * scale

            return run

        return gradients.check_gradients(NETWORKS["mlp"], [contestants.Contestant("single", "full", prepare, **how)])

    assert judged(1.0, double=False) == {}
    with pytest.raises(gradients.WrongGradientError, match="its float32 gradient is off"):
        judged(1.001, double=False)
    with pytest.raises(AssertionError, match="asked for float64"):
        judged(1.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="they run on a GPU")
def test_backends_that_need_a_gpu_are_left_out_with_their_reason():
    chosen = contestants.contestants(backends=["cuda"], containing="full, store, cuda")
    skipped = gradients.check_gradients(NETWORKS["mlp"], chosen)
    assert list(skipped) == ["ours, full, store, cuda"] and "backend 'cuda' cannot serve" in skipped[chosen[1].name]
