"""The same weights, cut otherwise: layers of one side whose tensors are parts, or several, of the other side's."""
