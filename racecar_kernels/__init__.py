"""Fused kernels for pretraining with a reverse pass (racecar training).

reverse_layer     the reverse of one layer and its loss; chain it for a full reverse
deferred_layer    the same, computed in the backward pass only
tied_chain        forward and reverse of a whole chain in one autograd node
backends          names of the implementations, in order of preference
autotune          measures the Triton kernels' configs, and keeps the best in a file
why_not           why a backend cannot serve a layer
show_config       versions, backends and what speaks against them
"""

from .backends import Query, backends, choose, why_not
from .chain_ops import ChainReport
from .config import show_config
from .functional import deferred_layer, loss_factor, reverse_layer, reverse_layers, run_chain, tied_chain
from .gpu.tuning import autotune
from .layer import Activation, Chain, Latent, Layer, Norm, Pool, Segment, Tied, Upsample
from .ops import Report
from .undo import apply as undo_steps

__all__ = [
    "Activation",
    "Chain",
    "ChainReport",
    "Latent",
    "Layer",
    "Norm",
    "Pool",
    "Query",
    "Report",
    "Segment",
    "Tied",
    "Upsample",
    "autotune",
    "backends",
    "choose",
    "deferred_layer",
    "loss_factor",
    "reverse_layer",
    "reverse_layers",
    "run_chain",
    "show_config",
    "tied_chain",
    "undo_steps",
    "why_not",
]

__version__ = "0.1.0"
