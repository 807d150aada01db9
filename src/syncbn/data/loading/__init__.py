"""Which images make up which batch, on which rank and in which order, and how they are read."""
