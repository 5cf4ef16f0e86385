"""Tensors in, tensors out: no modules, no files, no logging, no choice of device."""
