"""The two frameworks: each folder imports its own, and nothing else in `parity` should."""
