"""What each instruction does: decoded once, into a function of a gang and the mask of its active threads."""

from . import arithmetic, conversions, lanes, memory, tensor_cores  # each adds its own to the decoder's table
from .decoder import INSTRUCTIONS, Decoder

__all__ = ["INSTRUCTIONS", "Decoder", "arithmetic", "conversions", "lanes", "memory", "tensor_cores"]
