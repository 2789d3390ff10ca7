"""The paper: equations 3 to 6, tensors in, tensors out."""
