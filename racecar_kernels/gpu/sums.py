"""The second stage of a sum: what programs have written, each for itself, is added up in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import configs


def sum_partials(partials: Tensor, out: Tensor, sign: int = 1) -> Tensor:
    """out = sign · Σ_program partials[program], as they lie in memory. partials: programs × numbers of out, float32."""
    blocks = configs.summing(partials.shape[0])
    sum_partials_kernel[(triton.cdiv(out.numel(), blocks["BLOCK_E"]),)](
        partials, out, partials.shape[0], out.numel(), SIGN=sign, **blocks
    )
    return out


@triton.jit
def sum_partials_kernel(
    partials, out, programs, count, SIGN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr
):
    """out[e] = SIGN · Σ_program partials[program, e], in a fixed order; in float64, since the sums may cancel."""
    o_e = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_P, BLOCK_E), tl.float64)
    for start in range(0, programs, BLOCK_P):
        o_p = start + tl.arange(0, BLOCK_P)
        m = (o_p < programs)[:, None] & (o_e < count)[None, :]
        total += tl.load(partials + o_p.to(tl.int64)[:, None] * count + o_e[None, :], mask=m, other=0.0).to(tl.float64)
    rounded = (SIGN * tl.sum(total, 0)).to(tl.float32)  # Triton's interpreter cannot turn float64 into bfloat16
    tl.store(out + o_e, rounded.to(out.dtype.element_ty), mask=o_e < count)
