"""Models: where they come from, how they are built, and how their weights reach the engine."""
