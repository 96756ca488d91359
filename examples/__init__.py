"""Programs to read and to run; none of them is needed by the packages."""
