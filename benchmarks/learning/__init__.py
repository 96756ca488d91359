"""How well and how fast BLeNet learns, with batch norm and without: what the two studies share."""
