"""What a chain refuses: with the number of the layer, in the words of who gave x, and before anything is computed."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import racecar
import racecar_kernels as rk
from racecar_kernels.layer import Activation, Layer, Norm, Pool, Tied, Upsample

SAME = dict(stride=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1))
CONV = Layer(Tied(**SAME))
X, FIRST, SECOND = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(4, 4, 3, 3)


def tied(**changes) -> list[Layer]:
    return [Layer(Tied(**{**SAME, **changes}))]


def behind(*pre) -> list[Layer]:
    return [Layer(Tied(**SAME), pre=pre)]


def pool(kernel=(2, 2), stride=(2, 2), padding=(0, 0), dilation=(1, 1), **others) -> Pool:
    return Pool(kernel, stride, padding, dilation, **others)


def run(x=X, layers=(CONV,), weights=(FIRST,), biases=None, params=(), **settings):
    biases = [None] * len(layers) if biases is None else biases
    return rk.tied_chain(x, list(layers), weights, biases, params, **settings)


def refused(error: type[Exception], says: str, **given) -> None:
    """Sentences speak of x, and of neither y nor target, which are the words of a single reverse layer."""
    with pytest.raises(error, match=says) as caught:
        run(**given)
    assert not re.search(r"\b(y|target)\b", str(caught.value))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (dict(weights=[None]), "layer 1: weight must be a tensor, got NoneType"),
        (dict(layers=[CONV] * 2, weights=[FIRST, None]), "layer 2: weight must be a tensor, got NoneType"),
        (dict(biases=[[1.0]]), "layer 1: bias must be a tensor, got list"),
        (dict(weights=None), "weights must be a sequence of tensors, got NoneType"),
        (dict(weights=FIRST), "weights must be a sequence of tensors, got a single tensor"),
        (dict(biases=1), "biases must be a sequence of tensors, got int"),
        (dict(params=None), "params must be a sequence of tensors, got NoneType"),
        (dict(weights=[FIRST.to_sparse()]), "layer 1: weight must be a dense tensor, .*use its to_dense"),
        (dict(weights=[FIRST.double()]), "layer 1: weight is torch.float64, x is torch.float32; both must have one"),
        (dict(biases=[torch.randn(4).double()]), "layer 1: bias is torch.float64, x is torch.float32"),
        (dict(layers=[Layer(nn.Conv2d(3, 4, 3))]), "layer 1: tied holds Tied of racecar_kernels, got Conv2d"),
        (dict(layers=behind(nn.MaxPool2d(2))), "layer 1: pre holds Pool or Upsample of racecar_kernels, got MaxPool2d"),
        (dict(layers=[Layer(Tied(**SAME), [])]), r"layer 1: pre must be a tuple of Pool and Upsample, got \[\]"),
        (dict(layers=[Layer(Tied(**SAME), (), None)]), "layer 1: latent: must be a tuple of Activation and Norm, got"),
        (dict(last=[nn.ReLU()]), "last holds Activation or Norm of racecar_kernels, got ReLU"),
    ],
    ids=lambda v: v if isinstance(v, str) else "given",
)
def test_wrong_types(given, says):
    refused(TypeError, says, **given)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (dict(weights=[SECOND]), "layer 1: weight expects 4 input channels, but x has 3"),
        (dict(layers=[CONV] * 2, weights=[FIRST] * 2), "layer 2: weight expects 3 input channels, but receives 4"),
        (dict(x=torch.randn(2, 3), layers=[Layer(Tied())] * 2, weights=[torch.randn(4, 3)] * 2),
         "layer 2: weight expects 3 input features, but receives 4"),
        (dict(x=X[0]), r"layer 1: x of a 2d convolution must be \(batch, channels, 2 spatial sizes\), got \(3, 8, 8\)"),
        (dict(layers=[CONV] * 2, weights=[FIRST, torch.randn(4, 4)]), "layer 2: a 2d convolution's weight has 4 dim"),
        (dict(layers=[CONV] * 2, weights=[FIRST, SECOND], biases=[None, torch.randn(5)]),
         r"layer 2: bias must have shape \(4,\) to match weight, got \(5,\)"),
        (dict(weights=[FIRST.to("meta")]), "layer 1: weight is on meta, x is on cpu; all tensors must be on one"),
        (dict(layers=behind(pool((20, 20)))), r"layer 1: x, \(2, 3, 8, 8\), is too small for the pooling"),
        (dict(layers=[Layer(Tied((1, 1), ((0, 0), (0, 0)), (1, 1)))], weights=[torch.randn(4, 3, 9, 1)]),
         r"layer 1: x, \(2, 3, 8, 8\), is too small for weight \(4, 3, 9, 1\)"),
        (dict(last=[Norm("batch", 1e-5)], params=[torch.randn(3), None, None, None]),
         "layer 1: the batch norm's scale has 3 values, its input 4 channels"),
        (dict(last=[Norm("batch", 1e-5)], params=[torch.randn(4, device="meta"), None, None, None]),
         "layer 1: a tensor of its norms and activations is on meta, x is on cpu; use one device"),
        (dict(last=[Norm("layer", 1e-5, shape=(9,))], params=[None] * 4),
         r"layer 1: layer norm over \(9,\) cannot be applied to what it gives, shape \(2, 4, 8, 8\)"),
        (dict(last=[Activation("prelu")], params=[torch.randn(3)]),
         "layer 1: PReLU needs 1 slope or one for each of 4 channels, got 3"),
        (dict(layers=tied(padding=((9, 9), (1, 1)), padding_mode="reflect")), "layer 1: padding_mode='reflect'"),
    ],
    ids=lambda v: v if isinstance(v, str) else "given",
)  # fmt: skip
def test_what_does_not_fit_together(given, says):
    refused(ValueError, says, **given)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (dict(layers=tied(stride=(0, 1))), r"layer 1: stride must be a tuple of whole numbers of at least 1, got \(0"),
        (dict(layers=tied(stride=(1.5, 1))), "layer 1: stride must be a tuple of whole numbers"),
        (dict(layers=tied(stride=1)), "stride must be a tuple of whole numbers of at least 1, got 1"),
        (dict(layers=tied(stride=[1, 1])), r"stride must be a tuple of whole numbers of at least 1, got \[1, 1\]"),
        (dict(layers=tied(stride=(1,) * 4)), "stride must have 1 to 3 numbers, or none for a linear layer, got"),
        (dict(layers=tied(stride=())), "stride must have 1 to 3 numbers, or none for a linear layer, got"),
        (dict(layers=[CONV, *tied(dilation=(0, 1))], weights=[FIRST, SECOND]), "layer 2: dilation must be a tuple"),
        (dict(layers=tied(groups=0)), "layer 1: groups must be a whole number of at least 1, got 0"),
        (dict(layers=tied(padding=(1, 1))), r"padding must be 2 pairs \(before, after\), got \(1, 1\)"),
        (dict(layers=tied(padding=((1, 1), (-1, 1)))), r"at least 0, got \(-1, 1\)"),
        (dict(layers=tied(padding_mode="wrap")),
         "layer 1: padding_mode must be one of 'zeros', 'reflect', 'replicate', 'circular', got 'wrap'"),
        (dict(layers=behind(pool((2,), (2,), (0,), (1,)))), "layer 1: 1d pooling in front of a 2d convolution; 2d"),
        (dict(layers=[Layer(Tied((1,), ((1, 1),), (1,)), pre=(pool(),))], x=X[0], weights=[FIRST[0]]),
         "layer 1: 2d pooling in front of a 1d convolution; 1d would be right, got Pool"),
        (dict(layers=[Layer(Tied(), pre=(pool(),))]), "layer 1: pooling in front of a linear layer, whose input"),
        (dict(layers=behind(pool(2))), "layer 1: 0d pooling in front of a 2d convolution"),
        (dict(layers=behind(pool(stride=(0, 2)))), r"stride of the pooling must be a tuple of 2 .* got \(0, 2\)"),
        (dict(layers=behind(pool(padding=(2, 0)))), "padding of the pooling can be at most half its kernel, 1, got 2"),
        (dict(layers=behind(pool(mode="min"))), "mode of the pooling must be one of 'max', .*, got 'min'"),
        (dict(layers=behind(Upsample((0, 2)))), r"factor of the up-sampling must be a tuple of 2 .* got \(0, 2\)"),
        (dict(layers=behind(Upsample((2,)))), "1d up-sampling in front of a 2d convolution"),
        (dict(last=[Activation("leaky_relu")]), r"the args of leaky_relu are \(negative_slope,\), got \(\)"),
        (dict(last=[Activation("relu", (1.0,))]), r"the args of relu are \(\), got \(1.0,\)"),
        (dict(last=[Activation("elu", 0.1)]), r"the args of elu are \(alpha,\), got 0.1"),
        (dict(last=[Activation("hardtanh", (0.0,))]), r"the args of hardtanh are \(min_val, max_val\), got \(0.0,\)"),
        (dict(last=[Activation("elu", ("a",))]), "alpha of elu must be a number, got 'a'"),
        (dict(last=[Activation("gelu", ("erf",))]), "approximate of gelu must be 'none' or 'tanh', got 'erf'"),
        (dict(layers=[CONV, Layer(Tied(**SAME), (), (Activation("cosine"),))], weights=[FIRST, SECOND]),
         "layer 2: latent: no activation is named 'cosine'; there are relu, "),
        (dict(last=[Norm("spectral", 1e-5)], params=[None] * 4), "no norm is of the kind 'spectral'; there are batch"),
        (dict(last=[Norm("group", 1e-5)], params=[None] * 4), "groups of the norm must be a whole number"),
    ],
    ids=lambda v: v if isinstance(v, str) else "given",
)  # fmt: skip
def test_values_that_describe_no_layer(given, says):
    refused(ValueError, says, **given)


def test_a_single_reverse_layer_made_by_hand_is_looked_at_too():
    y = torch.randn(2, 4, 8, 8, requires_grad=True)
    with pytest.raises(ValueError, match="layer 1: stride must be a tuple"):
        rk.reverse_layers(rk.Segment(tuple(tied(stride=(0, 0)))), y, [X], [FIRST], [None], [])
    with pytest.raises(TypeError, match="^weight must be a tensor, got NoneType"):
        rk.deferred_layer(rk.Segment((CONV,)), y, X, None, None, [], rk.Report())


# ------------------------------------------------------------------------------------------- wrapped nets


def conv_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3))


def flat_net() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.mark.parametrize("given", [[[1.0, 2.0]], None, 1.0, "x"], ids=str)
@pytest.mark.parametrize("variant", ["full", "local"])
@pytest.mark.parametrize("build", [conv_net, flat_net])
def test_a_wrapped_net_names_what_it_was_given_instead_of_a_tensor(build, variant, given):
    net = racecar.wrap(build(), 1.0, variant=variant)
    with pytest.raises(TypeError, match=f"the model's input must be a tensor, got {type(given).__name__}"):
        net(given)


@pytest.mark.parametrize("variant", ["full", "local"])
@pytest.mark.parametrize(
    ("net", "x", "says"),
    [
        (conv_net(), torch.randn(2, 5, 8, 8), "layer 1: weight expects 3 input channels, but x has 5"),
        (conv_net(), torch.randn(2, 3, 2, 2), r"layer 2: what it receives, \(2, 4, 2, 2\), is too small for weight"),
        (conv_net(), torch.randn(2, 3, 8, 8).double(), "layer 1: weight is torch.float32, x is torch.float64"),
        (flat_net(), torch.randn(2, 5), "layer 1: weight expects 12 input features, but x has 5"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(3, 2, 1)),
            torch.randn(2, 3, 4, 4),
            "layer 2: weight expects 3 input channels, but receives 4",
        ),
        (
            nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(5, 2)),
            torch.randn(2, 3),
            "layer 2: weight expects 5 input features, but receives 4",
        ),
    ],
    ids=["channels", "small", "dtype", "features", "misfit", "linear misfit"],
)
def test_a_wrapped_net_speaks_of_x_and_of_the_layer(net, x, says, variant):
    wrapped = racecar.wrap(net, 1.0, variant=variant)
    try:
        with pytest.raises((TypeError, ValueError), match=says) as caught:
            wrapped(x)
        assert not re.search(r"\b(y|target)\b", str(caught.value))
    finally:
        wrapped.unwrap()
