"""What each layer deserves: levels, what they cost and lose, and the best choice for a size."""
