"""What is known: architectures, key maps and the operations that they name, read from YAML."""
