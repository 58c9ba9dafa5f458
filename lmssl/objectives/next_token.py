"""Next-token prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lmssl.objectives.base import IGNORE, Arrays, Family, Row, SameLength, Vocab, first_tokens


@dataclass(frozen=True, slots=True)
class NextToken(SameLength):
    """Predict each token from those before it: the causal language model of GPT.

    Every token is a label but the first of each document, which has nothing before it. Labels are unshifted, as
    transformers' decoders expect them.

    Paper: Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training".

    Two documents, the second cut by the end of the row (eos = 1):

        ids       = [10 11  1 20 21 22]
        segments  = [ 1  1  1  2  2  2]
        ->
        input_ids = [10 11  1 20 21 22]
        labels    = [ .  11  1  . 21 22]      . is -100

    >>> row = Row(np.array([10, 11, 1, 20, 21, 22]), np.array([1, 1, 1, 2, 2, 2]))
    >>> NextToken()(row, None, None)["labels"].tolist()
    [-100, 11, 1, -100, 21, 22]
    """

    families: ClassVar[frozenset[Family]] = frozenset({"decoder"})
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, row: Row, vocab: Vocab, rng: np.random.Generator) -> Arrays:
        labels = np.where(first_tokens(row.segments) | (row.segments == 0), IGNORE, row.ids)
        return {"input_ids": row.ids, "segments": row.segments, "labels": labels}
