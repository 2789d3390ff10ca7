"""The verbs, one module each. They meet on disk, in the run directory, and never import each other."""
