"""A diffusers folder: the names of its files, and what lies in it."""
