"""What the user asks for: keys, faults, prompts, pairs, wording."""
