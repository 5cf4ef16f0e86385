"""What is removed whole: how much of it, which of it, and what is left makes up for it."""
