"""What a side is and did, as numpy arrays and as files; needs no framework."""
