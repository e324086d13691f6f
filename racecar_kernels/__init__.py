"""Fused kernels for pretraining with a reverse pass (racecar training).

reverse_layer     the reverse of one layer and its loss; chain it for a full reverse
deferred_layer    the same, computed in the backward pass only
backends          names of the implementations, in order of preference
why_not           why a backend cannot serve a layer
show_config       versions, backends and what speaks against them
"""

from .backends import Query, backends, choose, why_not
from .config import show_config
from .functional import deferred_layer, loss_factor, reverse_layer, reverse_layers
from .layer import Activation, Latent, Layer, Norm, Pool, Segment, Tied, Upsample
from .ops import Report
from .undo import apply as undo_steps

__all__ = [
    "Activation",
    "Latent",
    "Layer",
    "Norm",
    "Pool",
    "Query",
    "Report",
    "Segment",
    "Tied",
    "Upsample",
    "backends",
    "choose",
    "deferred_layer",
    "loss_factor",
    "reverse_layer",
    "reverse_layers",
    "show_config",
    "undo_steps",
    "why_not",
]

__version__ = "0.1.0"
