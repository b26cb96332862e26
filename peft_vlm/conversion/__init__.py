"""Safe reading of official checkpoints; what they mean is known to the converter of each method."""
