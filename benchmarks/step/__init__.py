"""The peers of `benchmarks/train_step.py`, a module per library, and what measures them."""
