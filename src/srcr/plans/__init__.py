"""What to do: specs, a plan for each layer, and the plan made explicit against a model."""
