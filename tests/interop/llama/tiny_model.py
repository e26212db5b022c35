"""Writes a language model that knows a few words and means nothing by them, small enough to make for every test run.

A GGUF file: two layers of 64 dimensions with random weights, and a vocabulary of bytes, parts of words and words. Only
words are ever likely: all other rows of the output matrix, the end of the text's too, are zero. So answers are
readable, their tokens are words, and they end only by ``max_tokens`` or a stop word.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the tensors of llama.cpp's ``llama`` architecture.
"""

from __future__ import annotations

import random
import struct
from array import array
from pathlib import Path

_TEXT = "a channel opens once and every token after that is paid with one signature so no reader waits"
WORDS = tuple(_TEXT.split())
CONTEXT = 256
_WIDTH, _HIDDEN, _LAYERS, _HEADS = 64, 128, 2, 4
_ALIGNMENT = 32
_UINT32, _INT32, _FLOAT32, _STRING, _ARRAY = 4, 5, 6, 8, 9
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
_SPACE = "\u2581"
_FULL = tuple(_SPACE + word for word in WORDS)
_PARTS = tuple(sorted({*"".join(WORDS), *(full[:size] for full in _FULL for size in range(1, len(full)))} - {*_FULL}))
"""A text is cut into letters that are joined pair by pair, so every beginning of a word has to be a token too."""
_TOKENS = ("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *_PARTS, *_FULL)
_SILENT = len(_TOKENS) - len(WORDS)
_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

Shape = tuple[int, ...]


def write_model(path: Path, *, seed: int = 4) -> Path:
    """Write the model; the same seed gives the same file."""
    tensors = _tensors(random.Random(seed))
    facts = _facts()
    places, data = bytearray(), bytearray()
    for name, shape, values in tensors:
        dimensions = b"".join(struct.pack("<Q", size) for size in shape)
        places += _text(name) + struct.pack("<I", len(shape)) + dimensions + struct.pack("<IQ", 0, len(data))
        data += values.tobytes()
        data += bytes(-len(data) % _ALIGNMENT)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(facts)) + b"".join(facts) + places
    path.write_bytes(head + bytes(-len(head) % _ALIGNMENT) + data)
    return path


def _tensors(dice: random.Random) -> list[tuple[str, Shape, array[float]]]:
    def matrix(rows: int, columns: int, spread: float = 0.3) -> array[float]:
        return array("f", (dice.uniform(-spread, spread) for _ in range(rows * columns)))

    ones = array("f", [1.0] * _WIDTH)
    vocabulary = len(_TOKENS)
    output = array("f", bytes(4 * _WIDTH * _SILENT)) + matrix(_WIDTH, len(WORDS), 1.0)
    tensors: list[tuple[str, Shape, array[float]]] = [
        ("token_embd.weight", (_WIDTH, vocabulary), matrix(_WIDTH, vocabulary, 1.0)),
        ("output_norm.weight", (_WIDTH,), ones),
        ("output.weight", (_WIDTH, vocabulary), output),
    ]
    for layer in range(_LAYERS):
        place = f"blk.{layer}."
        tensors += [(f"{place}{name}.weight", (_WIDTH,), ones) for name in ("attn_norm", "ffn_norm")]
        for name, rows, columns in (
            *((f"attn_{part}", _WIDTH, _WIDTH) for part in ("q", "k", "v", "output")),
            ("ffn_gate", _WIDTH, _HIDDEN),
            ("ffn_up", _WIDTH, _HIDDEN),
            ("ffn_down", _HIDDEN, _WIDTH),
        ):
            tensors.append((f"{place}{name}.weight", (rows, columns), matrix(rows, columns)))
    return tensors


def _facts() -> list[bytes]:
    kinds = [_UNKNOWN, _CONTROL, _CONTROL, *[_BYTE] * 256]
    kinds += [_NORMAL] * (len(_TOKENS) - len(kinds))
    whole = {
        "llama.context_length": CONTEXT,
        "llama.embedding_length": _WIDTH,
        "llama.block_count": _LAYERS,
        "llama.feed_forward_length": _HIDDEN,
        "llama.attention.head_count": _HEADS,
        "llama.rope.dimension_count": _WIDTH // _HEADS,
        "llama.vocab_size": len(_TOKENS),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    texts = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "tokenizer.ggml.model": "llama",
        "tokenizer.chat_template": _TEMPLATE,
    }
    return [
        *(_fact(key, _STRING, _text(value)) for key, value in texts.items()),
        *(_fact(key, _UINT32, struct.pack("<I", value)) for key, value in whole.items()),
        _fact("llama.attention.layer_norm_rms_epsilon", _FLOAT32, struct.pack("<f", 1e-5)),
        _list("tokenizer.ggml.tokens", _STRING, [_text(token) for token in _TOKENS]),
        _list("tokenizer.ggml.scores", _FLOAT32, [struct.pack("<f", len(token)) for token in _TOKENS]),
        _list("tokenizer.ggml.token_type", _INT32, [struct.pack("<i", kind) for kind in kinds]),
    ]


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _fact(key: str, kind: int, value: bytes) -> bytes:
    return _text(key) + struct.pack("<I", kind) + value


def _list(key: str, kind: int, values: list[bytes]) -> bytes:
    return _fact(key, _ARRAY, struct.pack("<IQ", kind, len(values)) + b"".join(values))
