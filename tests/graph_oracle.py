"""Brute-force losses of the local reverse on any model that torch.fx traces: straight from the rules of a graph.

Shares nothing with the package: every value of the forward is kept, the rules are walked on the nodes of torch.fx, and
the reverse is plain PyTorch under plain autograd.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

TIED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh)
FUNCTIONS = (F.relu, F.relu_, torch.relu, F.gelu, F.silu, torch.sigmoid, torch.tanh, F.hardtanh, F.hardsigmoid)
METHODS = ("relu", "sigmoid", "tanh")
POOLS = (nn.MaxPool2d, nn.AvgPool2d)
POOLING = (F.max_pool2d, F.avg_pool2d)


class Values(fx.Interpreter):
    """Runs the traced forward and keeps a copy of what every node gave, before anything changes it in place."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        # an in-place operation behind this one must not reach the copy; gradients flow through it
        self.values[n] = value.clone() if isinstance(value, Tensor) else value
        return self.values[n]


def losses(model: nn.Module, x: Tensor, norm: str = "batch") -> tuple[Tensor, dict[str, Tensor]]:
    """The model's output, and name -> Σ (d - d')² / 2 of every layer."""
    graph = fx.symbolic_trace(model)
    run = Values(graph)
    y = run.run(x)
    modules = dict(model.named_modules())
    found: dict[str, Tensor] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module" and isinstance(modules[node.target], TIED):
            name, uses = node.target, 1
            while name in found:
                uses += 1
                name = f"{node.target}#{uses}"
            found[name] = loss(node, modules, run.values, norm)
    return y, found


def loss(node: fx.Node, modules: dict[str, nn.Module], values: dict[fx.Node, Any], norm: str) -> Tensor:
    op: Any = modules[node.target]
    d_node, pre = source(node), []
    while kind(d_node, modules) in ("pool", "up", "dropout"):
        pre.append(d_node)
        d_node = source(d_node)
    latent, at = [], d_node
    while kind(at, modules) in ("norm", "act", "dropout"):
        if kind(at, modules) != "dropout":
            latent.append(at)
        at = source(at)
    if at.op == "placeholder":
        latent = []
    y_node = reached = node
    while len(reached.users) == 1 and kind(next(iter(reached.users)), modules) in ("norm", "act", "dropout"):
        reached = next(iter(reached.users))
        if kind(reached, modules) != "dropout":
            y_node = reached
    d, seen, y = values[d_node], values[source(node)], values[y_node]
    h = transposed(op, y, seen)
    for step in reversed(latent):
        h = again(step, modules, values, h, norm)
    for step in pre:
        if kind(step, modules) == "pool":
            h = repeated(h, stride_of(step, modules), values[source(step)].shape)
        elif kind(step, modules) == "up":
            h = F.max_pool2d(h, values[step].shape[-1] // values[source(step)].shape[-1])
    return ((d - h) ** 2).sum() / 2


def source(node: fx.Node) -> fx.Node:
    first = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(first, fx.Node)
    return first


def kind(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    target: Any = node.target
    if node.op == "call_module":
        module = modules[target]
        for kinds, name in ((NORMS, "norm"), (ACTIVATIONS, "act"), (POOLS, "pool"), (nn.Upsample, "up")):
            if isinstance(module, kinds):
                return name
        return "dropout" if isinstance(module, nn.Dropout) else "other"
    if node.op == "call_function" and target is not operator.add:
        if target in FUNCTIONS:
            return "act"
        if target is F.layer_norm:
            return "norm"
        if target in POOLING:
            return "pool"
        return "up" if target is F.interpolate else "dropout" if target is F.dropout else "other"
    return "act" if node.op == "call_method" and target in METHODS else "other"


def stride_of(node: fx.Node, modules: dict[str, nn.Module]) -> int:
    if node.op == "call_module":
        stride: Any = modules[node.target].stride  # type: ignore[index]
    else:
        stride = node.kwargs.get("stride") or node.args[1]
    return stride[0] if isinstance(stride, tuple) else int(stride)


def again(node: fx.Node, modules: dict[str, nn.Module], values: dict[fx.Node, Any], h: Tensor, norm: str) -> Tensor:
    """The norm or activation of this node on what comes back; running statistics are read, never written."""
    if node.op == "call_method":
        return getattr(h, str(node.target))()
    if node.op == "call_function":
        function: Any = node.target
        kwargs = {k: v for k, v in node.kwargs.items() if k not in ("inplace", "input")}
        return function(h.clone(), *[values[a] if isinstance(a, fx.Node) else a for a in node.args[1:]], **kwargs)
    module: Any = modules[str(node.target)]
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        batch = module.training and norm == "batch"
        stats = (None, None) if batch else (module.running_mean, module.running_var)
        return F.batch_norm(h, *stats, module.weight, module.bias, batch, 0.0, module.eps)
    if isinstance(module, ACTIVATIONS) and getattr(module, "inplace", False):
        h = h.clone()
    return module(h)


def transposed(op: Any, y: Tensor, seen: Tensor) -> Tensor:
    """The exact adjoint of the operation, by autograd: the gradient of ⟨op(z), y − b⟩ with respect to z."""
    if isinstance(op, nn.Linear):
        return (y if op.bias is None else y - op.bias) @ op.weight
    if op.bias is not None:
        y = y - op.bias.view(1, -1, *[1] * (seen.dim() - 2))
    z = torch.zeros_like(seen, requires_grad=True)
    own = op._conv_forward(z, op.weight, None)
    return torch.autograd.grad(own, z, y, create_graph=True)[0]


def repeated(h: Tensor, stride: int, size: torch.Size) -> Tensor:
    for dim in (2, 3):
        index = (torch.arange(size[dim]) // stride).clamp_max(h.shape[dim] - 1)
        h = h.index_select(dim, index)
    return h
