"""From a file to its header: safetensors, PyTorch and GGUF, strictly, no data and no code."""
