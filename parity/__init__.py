"""The bridge between the two wings, and the only package that imports both frameworks."""
