"""Layers, tuner and configuration by which trainable tensors enter a model. Knows layers, not methods."""
