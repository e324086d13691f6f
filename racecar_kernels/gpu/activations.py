"""The activations of csrc/pointwise.h for Triton: same numbers, same parameters, derivatives from the output.

    1 clamp        max(p0, min(p1, u)); relu is p0 = 0 and p1 = NaN, which no number is above
    2 leaky_relu   u > 0 ? u : p0 · u
    3 elu          u > 0 ? p1 · u : p0 · expm1(p2 · u)
    4 tanh, 5 sigmoid, 6 softsign; 0 identity

Everything is computed in float32. NaN and infinity come out as in plain PyTorch.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expm1(x):
    """e^x - 1. Near 0 by its series, where subtracting 1 would lose the digits."""
    series = x * (1 + x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040)))))))
    return tl.where(tl.abs(x) < 0.35, series, tl.exp(x) - 1)


@triton.jit
def tanh(x):
    """tanh(x) = -e / (e + 2) with e = expm1(-2|x|), and the sign of x."""
    e = expm1(-2 * tl.abs(x))
    size = -e / (e + 2)
    return tl.where(x < 0, -size, size)


@triton.jit
def activate(u, p0, p1, p2, ACT: tl.constexpr):
    """The activation number ACT of u (float32)."""
    if ACT == 1:
        u = tl.where(u < p0, p0, u)
        u = tl.where(u > p1, p1, u)
    elif ACT == 2:
        u = tl.where(u > 0, u, u * p0)
    elif ACT == 3:
        u = tl.where(u <= 0, p0 * expm1(tl.where(u * p2 < 0, u * p2, 0.0)), u * p1)
    elif ACT == 4:
        u = tanh(u)
    elif ACT == 5:
        e = tl.exp(-tl.abs(u))
        u = tl.where(u >= 0, 1.0, e) / (1 + e)
    elif ACT == 6:
        u = u / (1 + tl.abs(u))
    return u


@triton.jit
def differentiate(g, a, p0, p1, p2, ACT: tl.constexpr):
    """g times the derivative of activation ACT, from its output a."""
    if ACT == 1:
        g = tl.where(a <= p0, 0.0, g)
        g = tl.where(a >= p1, 0.0, g)
    elif ACT == 2:
        g = tl.where(a > 0, g, g * p0)
    elif ACT == 3:
        g = tl.where(a <= 0, g * p2 * (a + p0), g * p1)
    elif ACT == 4:
        g = g * (1 - a * a)
    elif ACT == 5:
        g = g * (1 - a) * a
    elif ACT == 6:
        rest = 1 - tl.abs(a)
        g = g * (rest * rest)
    return g
