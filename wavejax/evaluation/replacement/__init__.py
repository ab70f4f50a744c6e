"""Which replacement policy the row cache should have: traces of real decoding, and simulations."""
