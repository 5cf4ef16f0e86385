"""What is left, and what it costs: rates, divergence, and their intervals."""
