"""Every gold answer of a SQuAD file through the windows and back, for three kinds of tokenizer; prints one JSON line each.

    python -m tests.drills.squad QUESTIONS.jsonl.gz [LENGTH] [STRIDE]

An answer whose ends are token edges must stand wholly in a window and come back verbatim from its positions; one that
ends inside a token is counted, and must come back as the smallest run of tokens that covers it. Exit 1 otherwise.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from lmssl import tokenization
from lmssl.data import corpus
from lmssl.tasks import squad
from lmssl.tasks.base import Backbone
from lmssl.tasks.qa import Question, QuestionAnswering


def check(kind: str, questions: list[Question], length: int, stride: int) -> dict:
    """Counts for one kind of tokenizer, trained on the contexts themselves."""
    tokenizer = tokenization.train(dict.fromkeys(q.text for q in questions), kind, 8192)
    task = QuestionAnswering(stride=stride)
    backbone = Backbone("", None, "encoder", tokenizer, length)
    counts = {"questions": 0, "windows": 0, "verbatim": 0, "inside_a_token": 0, "lost": 0, "wrong": 0}
    for number, answer in [(n, a) for n, q in enumerate(questions) for a in q.answers]:
        question = replace(questions[number], answers=(answer,))
        (windows,) = task.windows(backbone, [question])
        held = [w for w in windows if w.answer != (w.null, w.null)]
        counts["questions"] += 1
        counts["windows"] += len(windows)
        if not held:
            counts["lost"] += 1
            continue
        (_, spans) = tokenizer.spans([question.text])[0]
        edges = answer[1] in set(spans[:, 0].tolist()) and answer[1] + len(answer[0]) in set(spans[:, 1].tolist())
        for w in held:
            start, end = np.zeros(len(w.ids)), np.zeros(len(w.ids))
            start[w.answer[0]] = end[w.answer[1]] = 1.0
            (best, *_), _ = squad.candidates(w, start, end, 1, length)
            text = question.text[best.begin : best.end]
            covers = best.begin <= answer[1] and best.end >= answer[1] + len(answer[0])
            counts["wrong"] += (text != answer[0]) if edges else not covers
        counts["verbatim" if edges else "inside_a_token"] += 1
    return {"drill": "squad", "tokenizer": kind, "held": not (counts["lost"] or counts["wrong"]), "length": length, "stride": stride, **counts}


def main(path: str, length: int = 256, stride: int = 64) -> int:
    questions = QuestionAnswering().read(corpus.resolve(path))
    found = [check(kind, questions, length, stride) for kind in ("bpe", "wordpiece", "unigram")]
    for row in found:
        print(json.dumps(row))
    return 0 if all(row["held"] for row in found) else 1


if __name__ == "__main__":
    assert Path(sys.argv[1]).exists(), sys.argv[1]
    sys.exit(main(sys.argv[1], *map(int, sys.argv[2:])))
