"""What a file is: the architecture, the task and the facts, with the evidence."""
