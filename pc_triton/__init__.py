"""Predictive coding beyond Gaussian distributions: PyTorch layers on fused Triton kernels.

import pc_triton as pc

free_energy = pc.FreeEnergy(model)      # a model with pc layers, or pc.convert(model)
loss = free_energy(x, y)                # inference
loss.backward()                         # learning
"""

from . import interrupt as interrupt  # first: what follows imports torch
from .context import add_energy
from .convert import convert
from .dispatch import use_backend
from .distributions import Distribution
from .families import Bernoulli, Categorical, Gaussian, GaussianLogVar, Laplace, StudentT
from .free_energy import FreeEnergy
from .head import Head
from .infer import Settled
from .nn import Attention, Linear, MultiheadAttention
from .orders import Order
from .recompute import checkpoint_contexts
from .report import NodeReport, NodeStep, Report
from .rules import Constant, Displacement, Fixed, Guarded, Tolerance

__version__ = "0.2.0"
"""The one place of the version: setup.py and the documentation read it here."""

__all__ = [
    "Attention",
    "Bernoulli",
    "Categorical",
    "Constant",
    "Displacement",
    "Distribution",
    "Fixed",
    "FreeEnergy",
    "Gaussian",
    "GaussianLogVar",
    "Guarded",
    "Head",
    "Laplace",
    "Linear",
    "MultiheadAttention",
    "NodeReport",
    "NodeStep",
    "Order",
    "Report",
    "Settled",
    "StudentT",
    "Tolerance",
    "add_energy",
    "checkpoint_contexts",
    "convert",
    "use_backend",
]
