"""What becomes of every key of a file."""
