"""Attention over that state, and full attention with the same methods."""
