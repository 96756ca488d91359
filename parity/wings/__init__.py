"""This project's own pair under the bridge; alone imports jax_bn, torch_bn, image_data."""
