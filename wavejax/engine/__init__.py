"""Generation: the programs of a step, sampling, and what callers give and get."""
