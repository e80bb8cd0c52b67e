"""A tiny model of a Llama's shape: configuration and a tokenizer whose tokens are bytes; vLLM makes up its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_SPECIAL = ("<s>", "</s>", "<pad>")

_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,  # 16 is refused by the attention of the CPU
    "vocab_size": 320,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "torch_dtype": "float32",
}
_GENERATION = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def write(folder: Path) -> None:
    """Write the files that vLLM reads from a model's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files().items():
        (folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")


def files() -> dict[str, dict[str, Any]]:
    """Return the files, by name."""
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _SPECIAL[0],
        "eos_token": _SPECIAL[1],
        "pad_token": _SPECIAL[2],
        "model_max_length": 2048,
        "chat_template": _CHAT,
    }
    return {
        "config.json": _CONFIG,
        "generation_config.json": _GENERATION,
        "tokenizer_config.json": tokenizer,
        "tokenizer.json": _tokenizer(),
    }


def _tokenizer() -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    words = [*_SPECIAL, *map(_visible, range(256))]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": word, "special": True, **flags} for number, word in enumerate(_SPECIAL)
        ],
        "normalizer": None,
        "pre_tokenizer": bytewise,
        "post_processor": None,
        "decoder": bytewise,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {word: number for number, word in enumerate(words)},
            "merges": [],
        },
    }


def _visible(byte: int) -> str:
    """The character that stands for a byte in byte-level BPE: itself where it can be seen, or one from U+0100 on."""
    hidden = [*range(0x21), *range(0x7F, 0xA1), 0xAD]
    return chr(0x100 + hidden.index(byte)) if byte in hidden else chr(byte)
