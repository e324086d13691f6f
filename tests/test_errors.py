"""What the operator refuses: each with what was given and what would be right, before anything is computed."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import racecar_kernels as rk
from racecar_kernels import describe
from racecar_kernels.backends import TABLE, Backend

Y, TARGET, WEIGHT, BIAS = (2, 4, 6, 5), (2, 3, 6, 5), (4, 3, 3, 3), (4,)


def layer(y=Y, target=TARGET, weight=WEIGHT, bias=BIAS, **kwargs):
    def tensor(value):
        return torch.randn(value) if isinstance(value, tuple) else value

    return rk.reverse_layer(tensor(y), tensor(target), tensor(weight), tensor(bias), padding=1, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "error", "says"),
    [
        (dict(target=(2, 4, 6, 5)), ValueError, "weight expects 3 input channels, target has 4"),
        (dict(target=(3, 6, 5)), ValueError, r"\(batch, channels, 2 spatial sizes\), got \(3, 6, 5\)"),
        (dict(y=(2, 4, 6, 6)), ValueError, r"y gives a source of shape \(2, 4, 6, 6\).*ask for \(2, 4, 6, 5\)"),
        (dict(y=(2, 5, 6, 5)), ValueError, r"ask for \(2, 4, 6, 5\)"),
        (dict(y=(0, 4, 6, 5), target=(0, 3, 6, 5)), ValueError, "y is empty.*at least one"),
        (dict(bias=(3,)), ValueError, r"bias must have shape \(4,\).*got \(3,\)"),
        (dict(weight=(4,)), ValueError, r"2 dimensions \(linear\) or 3 to 5"),
        (dict(target=(2, 3, 1, 0)), ValueError, "target is empty"),
        (dict(y=torch.ones(Y, dtype=torch.int64)), TypeError, "y must be a real floating-point.*int64"),
        (dict(target=torch.ones(TARGET, dtype=torch.complex64)), TypeError, "target must be.*complex64"),
        (dict(y=torch.ones(Y).double()), TypeError, "weight is torch.float32, y is torch.float64"),
        (dict(target=torch.ones(TARGET, device="meta")), ValueError, "target is on meta, y is on cpu"),
        (dict(latent=[nn.PReLU(2)]), ValueError, "1 slope or one for each of 3 channels, got 2"),
        (dict(latent=[nn.BatchNorm2d(5)]), ValueError, "scale has 5 values, its input 3 channels"),
        (dict(latent=[nn.GroupNorm(2, 4)]), ValueError, "4 values, its input 3 channels"),
        (dict(latent=[nn.GroupNorm(2, 4, affine=False)]), ValueError, "3 channels do not divide into 2 groups"),
        (dict(latent=[nn.LayerNorm((9, 9))]), ValueError, r"layer norm over \(9, 9\)"),
        (dict(latent=[nn.BatchNorm2d(3).to("meta")]), ValueError, "latent is on meta"),
        (dict(latent=[nn.Softmax(1)]), ValueError, "Softmax is no norm or elementwise activation"),
        (dict(latent=[nn.RReLU()]), ValueError, "random slopes"),
        (dict(pre=[nn.AdaptiveAvgPool2d(1)]), ValueError, "AdaptiveAvgPool2d is no pooling"),
        (dict(pre=[nn.Upsample(scale_factor=2, mode="bilinear")]), ValueError, "bilinear"),
        (dict(pre=[nn.Upsample(scale_factor=1.5)]), ValueError, "whole factors"),
        (dict(pre=[nn.Upsample(size=4)]), ValueError, "scale_factor="),
        (dict(pre=[nn.MaxPool2d(2, return_indices=True)]), ValueError, "gives a tuple"),
        (dict(reduction="median"), ValueError, "reduction must be one of 'l2', 'sum', 'mean', got 'median'"),
        (dict(memory="none"), ValueError, "memory must be one of 'store', 'recompute'"),
        (dict(norm="group"), ValueError, "norm must be one of 'batch', 'running'"),
        (dict(padding_mode="wrap"), ValueError, "padding_mode must be one of"),
        (dict(bias=torch.ones(4).double()), TypeError, "bias is torch.float64, y is torch.float32"),
        (dict(stride=0), ValueError, "stride must be a whole number of at least 1, or 2 of them, got 0"),
        (dict(stride=1.0), ValueError, "stride must be a whole number.*got 1.0"),
        (dict(stride=(1,)), ValueError, r"or 2 of them, got \(1,\)"),
        (dict(dilation="a"), ValueError, "dilation must be a whole number.*got 'a'"),
        (dict(groups=0), ValueError, "groups must be a whole number of at least 1"),
        (dict(latent=nn.ReLU()), TypeError, r"latent must be a sequence of modules.*write latent=\[ReLU\(\)\]"),
        (dict(latent=[nn.ReLU]), TypeError, r"latent must hold modules.*write ReLU\(\)"),
        (dict(y=[1.0]), TypeError, "y must be a tensor, got list"),
        (dict(target=torch.ones(TARGET).to_sparse()), TypeError, "target must be a dense tensor"),
        (dict(y=torch.ones(Y, device="meta")), ValueError, "target is on cpu, y is on meta"),
        (dict(pre=[nn.MaxPool1d(2)]), ValueError, "1d pooling or up-sampling in front of a 2d convolution"),
        (dict(backend="abacus"), ValueError, "no backend 'abacus'.*reference"),
    ],
    ids=str,
)
def test_refused(kwargs, error, says) -> None:
    with pytest.raises(error, match=says):
        layer(**kwargs)


def test_settings_of_the_padding() -> None:
    args = torch.randn(Y), torch.randn(TARGET), torch.randn(WEIGHT)
    with pytest.raises(ValueError, match="needs stride 1"):
        rk.reverse_layer(*args, padding="same", stride=2)
    with pytest.raises(ValueError, match="padding must be a whole number of at least 0.*got -1"):
        rk.reverse_layer(*args, padding=-1)
    with pytest.raises(ValueError, match=r"'reflect' can pad an image of size 6 by at most 5, got \(9, 9\)"):
        rk.reverse_layer(*args, padding=9, padding_mode="reflect")
    with pytest.raises(ValueError, match="'same', 'valid', got 'full'"):
        rk.reverse_layer(*args, padding="full")
    with pytest.raises(ValueError, match="too small for weight"):
        rk.reverse_layer(torch.randn(2, 4, 1, 1), torch.randn(2, 3, 2, 2), torch.randn(WEIGHT))


def test_the_operator_itself_counts_its_tensors() -> None:
    segment = rk.Segment((rk.Layer(rk.Tied()),))
    y, target, weight = torch.randn(2, 3), torch.randn(2, 4), torch.randn(3, 4)
    with pytest.raises(ValueError, match="1 reverse layers need 1 targets"):
        rk.reverse_layers(segment, y, [target, target], [weight], [None], [])
    with pytest.raises(ValueError, match="take 0 tensors.*got 1"):
        rk.reverse_layers(segment, y, [target], [weight], [None], [None])
    with pytest.raises(ValueError, match="a linear weight has 2 dimensions"):
        rk.reverse_layers(segment, y, [target], [torch.randn(3, 4, 1)], [None], [])
    with pytest.raises(ValueError, match="got a scalar"):
        rk.reverse_layers(segment, y, [torch.tensor(1.0)], [weight], [None], [])
    running = rk.Segment((rk.Layer(rk.Tied(), (), (rk.Norm("batch", 1e-5, running=True),)),))
    with pytest.raises(ValueError, match="mean and variance"):
        rk.reverse_layers(running, y, [target], [weight], [None], [None] * 4)
    two = rk.Segment((rk.Layer(rk.Tied()), rk.Layer(rk.Tied())))
    with pytest.raises(ValueError, match="the target of the layer above gives a source"):
        rk.reverse_layers(two, y, [target, target], [weight, weight], [None] * 2, [])
    with pytest.raises(ValueError, match="a deferred segment holds one layer, got 2"):
        rk.deferred_layer(two, y, target, weight, None, [], rk.Report())
    slope = rk.Segment((rk.Layer(rk.Tied(), (), (rk.Activation("prelu"),)),))
    with pytest.raises(ValueError, match="1 slope or one for each of 4 channels, got None"):
        rk.reverse_layers(slope, y, [target], [weight], [None], [None])


def test_modules_with_another_forward_are_not_taken_for_their_base() -> None:
    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    with pytest.raises(describe.UnsupportedError, match="Odd is not a Linear"):
        describe.tied_of(Odd(2, 3))


def test_backends_say_what_they_are(monkeypatch) -> None:
    assert rk.backends() == ("cpp", "triton", "reference")
    query = rk.Query(rk.Layer(rk.Tied()), "cpu", torch.float32)
    assert rk.why_not("reference", query) is None
    assert "run on the CPU, got tensors on cuda" in rk.why_not("cpp", query._replace(device="cuda"))
    assert "serve torch.float32" in rk.why_not("cpp", query._replace(dtype=torch.float16))
    every = "cpp, triton, reference, triton:fused, triton:library, cuda"
    with pytest.raises(ValueError, match=f"there is no backend 'abacus'; backend must be None or one of {every}$"):
        rk.why_not("abacus", query)
    text = rk.show_config()
    assert torch.__version__ in text and "reference" in text and "compiled extension" in text
    picky = Backend("picky", "for the test", lambda q: "it only serves Tuesdays", *[None] * 4)
    monkeypatch.setattr(sys.modules["racecar_kernels.backends"], "TABLE", (picky, *TABLE))
    layer()  # the next one in the table serves it
    with pytest.raises(ValueError, match="'picky' cannot serve this layer: it only serves Tuesdays"):
        layer(backend="picky")
