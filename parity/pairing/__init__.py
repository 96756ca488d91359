"""Which layer, tensor and axis is which on the other side."""
