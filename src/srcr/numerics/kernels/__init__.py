"""The steps within a block of columns, compiled: :mod:`~srcr.numerics.kernels.dispatch` picks by device.

Within a block the rows are independent: a column is fixed, and its error reaches the rest of the block.
:mod:`srcr.numerics.obs` and :mod:`srcr.numerics.descent` hold the reference in PyTorch, which runs
anywhere; the modules here are drop-in and tested against it.
"""
