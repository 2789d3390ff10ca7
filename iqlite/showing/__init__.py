"""Why: what every token earned, and a run as one page."""
