"""Batch norm measured beside its peers: how fast (`batch_norm.py`) and how exact (`exactness.py`)."""
