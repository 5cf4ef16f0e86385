"""Models: where they come from, what they are made of, and how their weights reach the engine."""
