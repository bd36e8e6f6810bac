"""Exactly reversible training of residual networks (BDIA) in JAX.

    h = block(params_k, x, key_k, *consts)                     # the update of one block
    y = bdia_jax.reversible_scan(block, stacked_params, x, key=key)

This module is the table of contents of the core, which imports neither Flax nor optax.
"""

from bdia_jax.adjoints import Adjoint, BackwardReport, Checkpoint, Direct, Online, Update
from bdia_jax.check import Reversibility, check_reversible
from bdia_jax.gamma import GammaChoice, choose_gamma
from bdia_jax.grid import from_grid, on_grid, quantize, straight_through, to_grid
from bdia_jax.maps import (
    bdia_inverse,
    bdia_step,
    pre_rounding,
    rounding_error,
    sample_signs,
    side_information,
)
from bdia_jax.reversible import reversible_scan, reversible_scan_pair
from bdia_jax.side_bits import pack_bits, packed_width, unpack_bits
from bdia_jax.steps import BDIA, Euler, Midpoint, Step

__version__ = "0.2.0.dev0"

__all__ = [
    "BDIA",
    "Adjoint",
    "BackwardReport",
    "Checkpoint",
    "Direct",
    "Euler",
    "GammaChoice",
    "Midpoint",
    "Online",
    "Reversibility",
    "Step",
    "Update",
    "bdia_inverse",
    "bdia_step",
    "check_reversible",
    "choose_gamma",
    "from_grid",
    "on_grid",
    "pack_bits",
    "packed_width",
    "pre_rounding",
    "quantize",
    "reversible_scan",
    "reversible_scan_pair",
    "rounding_error",
    "sample_signs",
    "side_information",
    "straight_through",
    "to_grid",
    "unpack_bits",
]
