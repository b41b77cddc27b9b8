"""Captions as token ids, without a learned vocabulary."""

import re
from zlib import crc32

import torch
from torch import Tensor


def tokenize(caption: str, vocabulary: int, max_words: int) -> Tensor:
    """Ids in [0, vocabulary) of the first `max_words` lower-cased words, int64 (n,); an empty caption gives (0,).

    Words are hashed, so the same word has the same id in every run and on every machine, and two words may share one.
    A learned tokenizer would have to be downloaded, and the model's text embedding is trained from nothing anyway.
    """
    words = re.findall(r"\w+", caption.lower())[:max_words]
    return torch.tensor([crc32(word.encode()) % vocabulary for word in words], dtype=torch.int64)
