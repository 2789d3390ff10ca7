"""Whether the target points the right way, and turning it."""
