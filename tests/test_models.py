"""Models that people have, of torchvision and timm: losses and gradients of some, one step and what is covered of many.

They run where a torchvision that fits this PyTorch, and timm, can be imported; one step of CI installs such a pair.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import graph_oracle
import pytest
import torch
from torch import nn

import racecar
from racecar.bench.networks import NETWORKS
from racecar_kernels import describe


def imported(name: str) -> Any:
    try:
        return __import__(name)
    except Exception as error:  # one that does not fit the running PyTorch raises anything
        return pytest.skip(f"{name} cannot be imported: {error}", allow_module_level=False)


def tiny_vit(models: Any) -> nn.Module:
    return models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=12, num_classes=3
    )


TORCHVISION: dict[str, tuple[Callable[[Any], nn.Module], int]] = {
    "vgg11": (lambda m: m.vgg11(num_classes=3), 32),
    "vgg11_bn": (lambda m: m.vgg11_bn(num_classes=3), 32),
    "resnet18": (lambda m: m.resnet18(num_classes=3), 32),
    "resnet50": (lambda m: m.resnet50(num_classes=3), 32),
    "densenet121": (lambda m: m.densenet121(num_classes=3), 32),
    "mobilenet_v3_small": (lambda m: m.mobilenet_v3_small(num_classes=3), 32),
    "convnext_tiny": (lambda m: m.convnext_tiny(num_classes=3, stochastic_depth_prob=0.0), 32),
    "efficientnet_b0": (lambda m: m.efficientnet_b0(num_classes=3, stochastic_depth_prob=0.0), 32),
    "vit": (tiny_vit, 16),
}


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


RUN = ("resnet18", "mobilenet_v3_small", "vit")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "how"), [*((name, "traced") for name in TORCHVISION), *((name, "run") for name in RUN)]
)
def test_losses_and_gradients_of_torchvision(name: str, how: str) -> None:
    models = imported("torchvision").models
    build, size = TORCHVISION[name]
    torch.manual_seed(0)
    net = without_dropout(build(models)).double()
    compare(net, torch.randn(3, 3, size, size, dtype=torch.float64), how)


@pytest.mark.parametrize("how", ["traced", "run"])
def test_losses_and_gradients_of_resnet110(how: str) -> None:
    """ResNet-110 for CIFAR (He et al. 2016), narrower and with fewer blocks of every width."""
    torch.manual_seed(0)
    net = NETWORKS["resnet110"].build(4).double()
    compare(net, torch.randn(2, 3, 8, 8, dtype=torch.float64), how)


def compare(net: nn.Module, x: torch.Tensor, how: str) -> None:
    """Local losses of all layers, and gradients of all parameters, with brute force."""
    twin = copy.deepcopy(net)
    y, wanted = graph_oracle.losses(twin, x)
    wrapped = racecar.wrap(net, 0.1, variant="local", example=x if how == "run" else None)
    names = wrapped.plan.names
    assert set(wanted) <= set(names), set(wanted) - set(names)
    assert set(names) - set(wanted) <= {n for n in names if "attention" in n}  # its projections are no modules of fx
    total = torch.zeros((), dtype=torch.float64)
    wrapped.lam = {n: 0.1 if n in wanted else 0.0 for n in names}
    for name in names:
        total = total + (0.1 * wanted[name] if name in wanted else 0)
    out = wrapped(x)
    torch.testing.assert_close(out, y)
    for name in wanted:
        torch.testing.assert_close(
            wrapped.reverse_losses[name], wanted[name].detach(), msg=lambda m, n=name: f"{n}: {m}"
        )
    got = torch.autograd.grad(out.square().sum() + wrapped.reverse_loss, list(net.parameters()))
    want = torch.autograd.grad(y.square().sum() + total, list(twin.parameters()))
    scale = max(w.abs().max() for w in want)
    for (n, _), g, w in zip(net.named_parameters(), got, want, strict=True):
        assert (g - w).abs().max() <= 1e-8 * scale, n


# one of every family that is small enough; the second number is the image's side
_AT_64 = """
resnet18 resnet26d resnext26ts seresnet18 res2net50_14w_8s densenet121 dla34 dpn48b hrnet_w18_small mobilenetv2_050
mobilenetv3_small_050 efficientnet_lite0 tf_efficientnet_b0 mnasnet_small ghostnet_050 mixnet_s regnetx_002 regnety_002
rexnet_100 cspresnet50 cspdarknet53 vovnet39a ese_vovnet19b_dw repvgg_a0 vgg11_bn xception41 nf_resnet26 skresnet18
selecsls42 tresnet_m hardcorenas_a convnext_atto convnextv2_atto poolformer_s12 mobileone_s0 hgnet_tiny lcnet_050
tinynet_e fbnetc_100 gernet_s pvt_v2_b0 repghostnet_050 starnet_s1 mobilenetv4_conv_small inception_next_tiny
ghostnetv2_100
"""
TIMM: dict[str, int] = {
    **dict.fromkeys(_AT_64.split(), 64),
    "resnest14d": 64,
    "inception_v3": 96,
    "edgenext_xx_small": 64,
    "vit_tiny_patch16_224": 224,
    "deit_tiny_patch16_224": 224,
    "swin_tiny_patch4_window7_224": 224,
    "gmlp_ti16_224": 224,
    "resmlp_12_224": 224,
    "mixer_s16_224": 224,
    "xcit_nano_12_p16_224": 224,
    "crossvit_tiny_240": 240,
    "convit_tiny": 224,
    "levit_128s": 224,
    "visformer_tiny": 224,
    "pit_ti_224": 224,
    "mobilevit_xxs": 256,
    "efficientformer_l1": 224,
    "nest_tiny": 224,
    "eva02_tiny_patch14_224": 224,
    "cait_xxs24_224": 224,
}


@pytest.mark.slow
def test_one_step_of_timm_models(capsys: pytest.CaptureFixture[str]) -> None:
    """Wrapped, trained one step, unwrapped; prints what is covered of every model."""
    imported("torchvision")
    timm = imported("timm")
    lines, wrong = [], {}
    for name, side in TIMM.items():
        try:
            lines.append(f"{name:32} {one_step(timm, name, side)}")
        except Exception as error:  # the others are still looked at
            wrong[name] = f"{type(error).__name__}: {error}"
    with capsys.disabled():
        print("\n" + "\n".join([*lines, f"{len(lines)} models of {len(TIMM)}"]))
    assert not wrong, wrong
    assert len(lines) >= 60


def one_step(timm: Any, name: str, side: int) -> str:
    torch.manual_seed(0)
    net = timm.create_model(name, pretrained=False, num_classes=10)
    x = torch.randn(2, 3, side, side)
    keys, kind = list(net.state_dict()), type(net)
    wrapped = racecar.wrap(net, 1e-6, example=x)
    y = wrapped(x)
    (y.square().mean() + wrapped.reverse_loss).backward()
    assert torch.isfinite(wrapped.reverse_loss) and wrapped.reverse_loss > 0
    covered = {id(layer.parameter()) for layer in wrapped.plan.layers}
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if id(p) in covered)
    operations = sum(describe.is_a(m, describe.TIED) for m in net.modules())
    plan = wrapped.plan
    assert wrapped.unwrap() is net and type(net) is kind and list(net.state_dict()) == keys
    why = "; ".join(sorted({reason for _, reason in plan.left_out}))
    return (
        f"{plan.variant:5} {len(plan.layers):3} layers, {operations:3} operations{'; left out: ' + why if why else ''}"
    )
