"""Reads pipelines from files: a folder in diffusers' layout and its components, or one file with all weights."""
