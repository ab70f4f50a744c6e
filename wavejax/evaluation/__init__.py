"""Comparisons of ways to decode: tasks, methods at one budget, judgements, tables and plots."""
