"""Linear layers, convolutions and transposed convolutions."""
