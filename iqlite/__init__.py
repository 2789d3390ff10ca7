"""iqlite: describe a behaviour in words and train it into the weights, on the GPU you already own (Inverse-Q*, arXiv 2408.14874)."""

__version__ = "0.1.0"
