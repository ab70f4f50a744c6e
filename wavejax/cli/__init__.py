"""The commands: their entry, signals and streams, options, and what they print.

Imports nothing, so that a command can set up its signals before anything that takes long.
"""
