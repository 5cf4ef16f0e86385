"""What came out: every result type, which is also its JSON."""
