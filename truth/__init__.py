"""What batch norm is held against: itself without rounding, and the inputs at which that is hard."""
