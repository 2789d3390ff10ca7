"""Which model a name means, where its files are, how it gets into memory."""
