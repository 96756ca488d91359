"""`parity.check` on networks that Hugging Face publishes in both frameworks: `make published`."""
