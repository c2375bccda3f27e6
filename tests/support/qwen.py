"""A small tokenizer of Qwen's kind: the published one has 11.4 MB and is not bundled."""

from __future__ import annotations

import json
from pathlib import Path

from ckptconv.configs.tokenizer import vocabulary
from ckptconv.maps.architecture import Architecture, bundled

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
MERGES = ("Ġ a", "c a", "ca t", "Ġ cat", "Ã ¯")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def config() -> dict[str, object]:
    """Returns a `tokenizer_config.json` with the entries that Qwen's has."""
    first = 256 + len(MERGES)
    added = {
        str(first + n): {
            **dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False),
            "content": token,
            "special": token.startswith("<|"),
        }
        for n, token in enumerate(SPECIALS)
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def write_tokenizer(folder: Path) -> Path:
    """Writes the folder of a tokenizer, and returns it."""
    folder.mkdir(parents=True)
    symbols = [*vocabulary()][:256]  # of the bytes; CLIP's are the same
    tokens = [*symbols, *("".join(merge.split()) for merge in MERGES)]
    texts = {
        "vocab.json": json.dumps({token: n for n, token in enumerate(tokens)}, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *MERGES]) + "\n",
        "tokenizer_config.json": json.dumps(config(), indent=2),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def tokenizers(architecture: str | Architecture, folder: Path) -> dict[str, Path]:
    """Writes the tokenizers that an architecture needs and that are not bundled.

    Returns the folders by the names of the options that take them.
    """
    if isinstance(architecture, str):
        architecture = bundled().architectures[architecture]
    needed = [name for name, c in architecture.components.items() if not c.bundled]
    return {name: write_tokenizer(folder / name) for name in needed}
