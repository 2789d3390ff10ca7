"""Talking to base, policy and superior."""
