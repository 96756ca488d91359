"""Measured beside their peers: a training step (`train_step.py`), batch norm (`batch_norm.py`, `exactness.py`)."""
