"""Training steps compiled for accelerators that are not here: what the programs read, write and wait for."""
