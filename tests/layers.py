"""Grids as tests name them: by their settings, without a spec."""

from srcr.numerics.grid import GridSpec
from srcr.numerics.scales import SHRINKS, fit_grid


def grid_of(W, bits, group, symmetric, dtype, importance=None, mask=None, search=True):
    """The grid of ``W`` [rows, cols]; without ``search`` that of its plain range."""
    spec = GridSpec(bits, group, symmetric, dtype)
    return fit_grid(W, spec, importance, mask, SHRINKS if search else ())
