"""Model files: what a path holds, its config and its parameters, in every format that is read."""
