"""The training loop, its optimizer, guards and checkpoints."""
