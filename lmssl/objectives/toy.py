"""A vocabulary of 40 ids for worked examples and tests: pad 0, eos 1, start 2, mask 4, sentinels 39, 38, ... 30."""

import numpy as np

from lmssl.objectives.base import Vocab


def vocab(size: int = 40, sentinels: int = 10, *, bos: int | None = None, every_word: bool = True) -> Vocab:
    """Ids 5 .. size - sentinels - 1 are ordinary words of three bytes; multiples of 5 end a sentence."""
    special = np.zeros(size, bool)
    special[:5] = special[size - sentinels :] = True
    ids = np.arange(size)
    return Vocab(
        size=size,
        pad=0,
        bos=bos,
        eos=1,
        mask=4,
        start=2,
        sentinels=np.arange(size - 1, size - 1 - sentinels, -1, dtype=np.int32),
        special=special,
        word_start=~special if every_word else ~special & (ids % 2 == 0),
        word_end=np.zeros_like(special),
        sentence_end=~special & (ids % 5 == 0),
        token_bytes=np.where(special, 0, 3).astype(np.int32),
    )
