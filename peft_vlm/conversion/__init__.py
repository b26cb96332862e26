"""Safe reading of official checkpoints; each method has its own converter."""
