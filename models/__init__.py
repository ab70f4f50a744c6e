"""Flax decoders, and what reads and writes their checkpoints. Attention is passed in."""
