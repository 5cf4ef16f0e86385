"""Every group of linears at every level, compressed once and kept on disk."""
