"""Explains a difference from the numbers alone: each side is fitted to a family of behaviours, and these compared."""
