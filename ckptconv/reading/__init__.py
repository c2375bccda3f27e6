"""From a file to its header: safetensors and PyTorch checkpoints, strictly, no data and no code."""
