"""One file a verb: what it prints."""
