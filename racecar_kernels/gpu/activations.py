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
    """e^x - 1 for x <= 0, as 2^n (e^r - 1) + (2^n - 1) with |r| <= log(2) / 2: nothing cancels, at 0 or elsewhere."""
    x = tl.where(x < -30, -30.0, x)  # where it is -1
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693145751953125) - n * 1.4286068203e-6  # log(2) in two parts: n times the first is exact
    series = 0.16666665673 + r * (0.041666481644 + r * (0.008333420381 + r * (0.00139333331 + r * 0.00019824094)))
    part = r + r * r * (0.5 + r * series)
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return power * part + (power - 1)


@triton.jit
def tanh(x):
    """x + x³ p(x²) near 0, p by minimax; elsewhere 1 - 2e / (1 + e) with e = exp(-2|x|), which would cancel there."""
    s = x * x
    p = -0.3333328068 + s * (0.1333144158 + s * (-0.05373971537 + s * (0.02063908242 - s * 0.005704982206)))
    small = x + x * (s * p)
    e = tl.exp(-2 * tl.abs(x))
    size = 1 - 2 * e / (1 + e)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -size, size))


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
