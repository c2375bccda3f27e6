"""Whether a folder is what it should be, by witnesses that do not share the plan."""
