"""The one model at work: its roles, its forward passes, decoding."""
