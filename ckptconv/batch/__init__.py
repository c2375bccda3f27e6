"""Many files: the same work on each, in one process, in several, or on many machines."""
