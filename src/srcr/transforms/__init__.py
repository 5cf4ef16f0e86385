"""Transforms, one file each: a function that takes a weight source and returns an overlay on it.

To add one, drop a file into this folder: a function ``(source, ...) -> TransformedSource``. Whoever reads
weights reads a source, so nothing else needs to know: ``open_model(model)`` shows them through
``.transformed(overlay)``, and everything that takes a model takes that.
"""
