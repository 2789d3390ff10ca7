"""Is it better, and did it break anything."""
