"""Plans of a run: what it takes of memory, and where its rows go."""
