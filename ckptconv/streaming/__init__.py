"""Plans carried out: streams from file to folder, and back."""
