"""What the bridge found in published ports, each shown again on a minimal pair of modules written for this purpose."""
