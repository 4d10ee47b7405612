"""The training loop, its components and its output."""
