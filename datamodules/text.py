"""Captions as token ids, without a learned vocabulary."""

from __future__ import annotations

from unicodedata import category, name, normalize
from zlib import crc32

import torch
from torch import Tensor

# Scripts written without spaces between words, by the first word of their characters' Unicode names.
_UNSPACED = frozenset(
    [
        "BOPOMOFO",
        "CJK",
        "HALFWIDTH",
        "HIRAGANA",
        "IDEOGRAPHIC",
        "KATAKANA",
        "KATAKANA-HIRAGANA",
        "KHMER",
        "LAO",
        "MYANMAR",
        "NUSHU",
        "TAI",
        "TANGUT",
        "THAI",
        "TIBETAN",
        "YI",
    ]
)
_SPACE, _JOINER = "\u200b", "\u200d"  # of no width: the first separates words, the second makes one emoji of several


def words(caption: str) -> list[str]:
    """The words of a caption, in NFC and case-folded.

    - A word is a run of letters, digits and underscores with their combining marks.
    - A script without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan, …) gives one word per character.
    - An emoji is a word, together with its skin tone and what it is joined to; so is any other pictorial symbol.
    - Punctuation separates words. Invisible characters (joiners, directions, variations) are dropped.
    """
    found: list[str] = []
    open_word = marked = joined = False  # what may go on with the last word: letters, marks, an emoji after a joiner
    for sign in normalize("NFC", normalize("NFC", caption).casefold()):
        kind = category(sign)
        if "\ufe00" <= sign <= "\ufe0f" or (kind == "Cf" and sign != _SPACE):
            joined = sign == _JOINER and marked
            continue
        symbol = kind == "So"
        tone = kind == "Sk" and "\U0001f3fb" <= sign <= "\U0001f3ff"
        flag = "\U0001f1e6" <= sign <= "\U0001f1ff" and bool(found) and len(found[-1]) == 1 and marked
        flag = flag and "\U0001f1e6" <= found[-1] <= "\U0001f1ff"
        letter = sign.isalnum() or sign == "_"
        alone = letter and not sign.isascii() and name(sign, "").partition(" ")[0] in _UNSPACED
        if marked and (kind[0] == "M" or tone or flag or (symbol and joined) or (letter and open_word and not alone)):
            found[-1] += sign
        elif letter or symbol or tone:
            found.append(sign)
            open_word = letter and not alone
            marked = True
        else:
            open_word = marked = False
        joined = False
    return found


def tokenize(caption: str, vocabulary: int, max_words: int) -> Tensor:
    """Ids in [0, vocabulary) of the first `max_words` words, int64 (n,); an empty caption gives (0,).

    Words are hashed, so that the same word has the same id in every run and on every machine, and two words may share
    an id. A learned tokenizer would have to be downloaded, and the model's text embedding is trained from scratch
    anyway.
    """
    # A lone surrogate, which JSON can hold, has no UTF-8.
    ids = [crc32(word.encode("utf-8", "surrogatepass")) % vocabulary for word in words(caption)[:max_words]]
    return torch.tensor(ids, dtype=torch.int64)
