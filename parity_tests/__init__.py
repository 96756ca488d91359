"""The parity suite and every other test, laid out like the packages; what compares the wings stands at the top."""
