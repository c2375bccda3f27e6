"""The names of the files in a diffusers folder."""

INDEX = "model_index.json"
RECORD = "source.json"
DROPPED = "dropped.safetensors"
LAYOUT = "layout.json"
"""The header of the source, as in `key_maps/*/layout.json`, for the way back."""

CONFIG_FILES = {
    "model": "config.json",
    "scheduler": "scheduler_config.json",
    "processor": "preprocessor_config.json",
    "tokenizer": "tokenizer_config.json",
}
"""By kind of the component, the file that configures it."""
