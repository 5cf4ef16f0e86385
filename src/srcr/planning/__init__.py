"""Which level each group of linears gets: cheap first, measured last."""
