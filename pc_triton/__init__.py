"""Predictive coding beyond Gaussian distributions: PyTorch layers on fused Triton kernels.

import pc_triton as pc

free_energy = pc.FreeEnergy(model)      # a model with pc layers, or pc.convert(model)
loss = free_energy(x, y)                # inference
loss.backward()                         # learning
"""

from .convert import convert
from .dispatch import use_backend
from .distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    Gaussian,
    GaussianLogVar,
    Laplace,
    StudentT,
    add_energy,
)
from .free_energy import FreeEnergy, Settled
from .head import Head
from .nn import Attention, Linear, MultiheadAttention
from .recompute import checkpoint_contexts
from .report import NodeReport, Report

__version__ = "0.1.0"

__all__ = [
    "Attention",
    "Bernoulli",
    "Categorical",
    "Distribution",
    "FreeEnergy",
    "Gaussian",
    "GaussianLogVar",
    "Head",
    "Laplace",
    "Linear",
    "MultiheadAttention",
    "NodeReport",
    "Report",
    "Settled",
    "StudentT",
    "add_energy",
    "checkpoint_contexts",
    "convert",
    "use_backend",
]
