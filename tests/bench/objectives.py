"""What a row costs: microseconds an item for each objective, and the loss against torch's own; one JSON line each.

python -m tests.bench.objectives
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from lmssl.data.stream import Collator, Stream
from lmssl.objectives import Infilling, MaskedTokens, NextToken, SpanCorruption
from lmssl.objectives.cross_entropy import summed_cross_entropy
from tests.helpers import token_set

PAIRS = 5


def seconds(run) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        tokens = token_set(Path(folder), 2000)
        for objective in (NextToken(), MaskedTokens(), MaskedTokens(unit="word"), SpanCorruption(), Infilling()):
            stream = Stream(tokens, objective, 128, 0, 10**6)
            collator = Collator(objective, 128, next(iter(objective.families)), stream.vocab.pad)
            times = [seconds(lambda s=stream, c=collator, n=n: c([s[i] for i in range(n * 64, n * 64 + 64)])) / 64 for n in range(PAIRS + 1)][1:]
            print(json.dumps({"bench": "row", "objective": str(objective), "microseconds": round(statistics.median(times) * 1e6, 1)}))
    torch.manual_seed(0)
    hidden, table, labels = torch.randn(2048, 128, requires_grad=True), torch.randn(8192, 128, requires_grad=True), torch.randint(0, 8192, (2048,))

    def step(loss) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            logits = F.linear(hidden, table)
        loss(logits).backward()

    ours, theirs = [], []
    for _ in range(PAIRS + 1):
        ours.append(seconds(lambda: step(lambda logits: summed_cross_entropy(logits, labels))))
        theirs.append(seconds(lambda: step(lambda logits: F.cross_entropy(logits.float(), labels, reduction="sum"))))
    ratios = [b / a for a, b in zip(ours[1:], theirs[1:], strict=True)]
    print(json.dumps({"bench": "projection and loss, 2048 x 8192 bf16", "torch_over_ours": round(statistics.median(ratios), 2)}))


if __name__ == "__main__":
    main()
