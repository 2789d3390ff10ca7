"""Why: what every token earned, a run as one page, and all runs as a table."""
