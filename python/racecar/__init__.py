"""Pretrain a PyTorch model together with its own reverse pass (racecar training).

import racecar
net = racecar.wrap(model, lam=1e-5)
loss = criterion(net(x), t) + net.reverse_loss
"""

from racecar_kernels import __version__

from .plan import Plan, PlannedLayer
from .wrap import wrap

__all__ = ["Plan", "PlannedLayer", "__version__", "wrap"]
