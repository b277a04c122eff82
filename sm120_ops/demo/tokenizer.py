"""BERT's uncased WordPiece tokenizer, read from a ``tokenizer.json``.

Small enough to own, so that the demo needs no package beside torch: clean and lower-case, drop
accents, split at spaces, punctuation and CJK characters, then greedy longest-match word pieces.
"""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import torch

# The blocks that BERT splits character by character (CJK ideographs only, as in its original code).
CJK_BLOCKS = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


def _is_cjk(char: str) -> bool:
    return any(low <= ord(char) <= high for low, high in CJK_BLOCKS)


def _is_punctuation(char: str) -> bool:
    """ASCII symbols such as ``$`` count as punctuation too, unlike in Unicode's own categories."""
    code = ord(char)
    ascii_symbol = 33 <= code <= 47 or 58 <= code <= 64 or 91 <= code <= 96 or 123 <= code <= 126
    return ascii_symbol or unicodedata.category(char).startswith("P")


def _is_control(char: str) -> bool:
    return char not in "\t\n\r" and unicodedata.category(char).startswith("C")


def split_words(text: str) -> list[str]:
    """Lower-cased words without accents; every punctuation mark and CJK character on its own."""
    text = "".join(c for c in text if c not in "\0\ufffd" and not _is_control(c)).lower()
    text = "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")
    spaced = (f" {c} " if _is_punctuation(c) or _is_cjk(c) else c for c in text)
    return "".join(spaced).split()


class WordPiece:
    """``encode(sentences)`` gives ids and a mask, both [batch, longest], padded with [PAD]."""

    def __init__(self, vocabulary: dict[str, int], max_length: int = 256, max_chars: int = 100):
        self.vocabulary = vocabulary
        self.max_length = max_length  # tokens kept of a sentence, [CLS] and [SEP] included
        self.max_chars = max_chars  # longer words are [UNK]

    @classmethod
    def from_file(cls, path: Path, max_length: int = 256) -> WordPiece:
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        if model.get("type") != "WordPiece":
            raise ValueError(f"{path}: expected a WordPiece tokenizer, got {model.get('type')!r}")
        return cls(model["vocab"], max_length, model.get("max_input_chars_per_word", 100))

    def word_pieces(self, word: str) -> list[int]:
        if len(word) > self.max_chars:
            return [self.vocabulary["[UNK]"]]
        pieces, start = [], 0
        while start < len(word):
            for end in range(len(word), start, -1):
                piece = ("##" if start else "") + word[start:end]
                if piece in self.vocabulary:
                    pieces.append(self.vocabulary[piece])
                    start = end
                    break
            else:
                return [self.vocabulary["[UNK]"]]
        return pieces

    def ids(self, text: str) -> list[int]:
        body = [piece for word in split_words(text) for piece in self.word_pieces(word)]
        body = body[: self.max_length - 2]
        return [self.vocabulary["[CLS]"], *body, self.vocabulary["[SEP]"]]

    def encode(self, sentences: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [self.ids(text) for text in sentences]
        longest = max(len(row) for row in rows)
        pad = self.vocabulary["[PAD]"]
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return ids, mask
