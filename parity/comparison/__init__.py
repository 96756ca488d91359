"""Two recordings side by side: differences, single-layer mode, rounding, bounds."""
