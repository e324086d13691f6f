"""Looking inside a network: what its layers see, tell and give back. Figures need matplotlib, arrays do not."""

from __future__ import annotations

from .information import InformationPlane, MutualInformationPlane, binned_information
from .modes import Modes, SingularVectors, data_modes, layer_modes, singular_vectors
from .reconstructions import Reconstructions, reconstructions
from .reversibility import LayerReversibility, Reversibility, reversibility

__all__ = [
    "InformationPlane",
    "LayerReversibility",
    "Modes",
    "MutualInformationPlane",
    "Reconstructions",
    "Reversibility",
    "SingularVectors",
    "binned_information",
    "data_modes",
    "layer_modes",
    "reconstructions",
    "reversibility",
    "singular_vectors",
]
