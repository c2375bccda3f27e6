"""The commands: thin, each a module with one `command`."""
