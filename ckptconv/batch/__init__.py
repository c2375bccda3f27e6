"""Many files: what is done to each, in one process, in several, or on many machines."""
