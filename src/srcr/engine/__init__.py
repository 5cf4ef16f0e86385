"""The streaming loop: a decoder block in memory at a time, and what it is given by the blocks before it."""
