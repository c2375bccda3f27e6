"""The configuration, scheduler and tokenizer files of a folder."""
