"""What lies between two layers, and before the first."""
