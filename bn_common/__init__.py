"""What the two wings share and neither framework is needed for.

The entrance checks (so that both wings refuse the same input with the same words), the training configuration with
its command line, and the run folder. Imports neither jax nor torch.
"""
