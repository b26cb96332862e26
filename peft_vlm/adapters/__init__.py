"""Where trainable tensors enter a network. Knows layers, not methods."""
