"""A layer's problem becomes compressed weights: a pruner and a quantizer put together."""
