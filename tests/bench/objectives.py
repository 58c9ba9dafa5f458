"""What a row costs: rows a second of each objective beside the stock collator where there is one, and the projection with its loss against torch's own.

python -m tests.bench.objectives
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

from lmssl import machine
from lmssl.data.stream import Collator, Stream
from lmssl.objectives import Infilling, MaskedTokens, NextToken, SpanCorruption
from lmssl.objectives.cross_entropy import linear_cross_entropy, summed_cross_entropy
from tests.bench.common import TOKENIZER
from tests.helpers import token_set

PAIRS, ROWS, LENGTH = 7, 64, 128


def seconds(run) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        tokens = token_set(Path(folder), 2000)
        rows = [{"input_ids": row} for row in torch.randint(200, 8000, (ROWS * (PAIRS + 1), LENGTH)).tolist()]
        tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
        named = {"next_token": NextToken(), "masked": MaskedTokens(), "masked, words": MaskedTokens(unit="word"), "span_corruption": SpanCorruption(), "infilling": Infilling()}
        for name, objective in named.items():
            stream = Stream(tokens, objective, LENGTH, 0, 10**6)
            collator = Collator(objective, LENGTH, next(iter(objective.families)), stream.vocab.pad)
            theirs = None
            if name in ("next_token", "masked"):
                theirs = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=name == "masked", mlm_probability=0.15)
            spent: tuple[list[float], list[float]] = ([], [])
            for n in range(PAIRS + 1):
                turn = range(n * ROWS, (n + 1) * ROWS)
                spent[0].append(seconds(lambda s=stream, c=collator, t=turn: c([s[i] for i in t])))
                if theirs:
                    spent[1].append(seconds(lambda c=theirs, t=turn: c([rows[i] for i in t])))
            line = {"bench": f"rows of {LENGTH}, {name}", "ours_rows_per_second": round(ROWS / statistics.median(spent[0][1:]))}
            if theirs:
                ratios = [b / a for a, b in zip(spent[0][1:], spent[1][1:], strict=True)]
                line |= {"stock_rows_per_second": round(ROWS / statistics.median(spent[1][1:])), "stock_over_ours": round(statistics.median(ratios), 2)}
            print(json.dumps(line), flush=True)
    torch.manual_seed(0)
    hidden, table, labels = torch.randn(2048, 128, requires_grad=True), torch.randn(8192, 128, requires_grad=True), torch.randint(0, 8192, (2048,))

    dtype = torch.bfloat16 if machine.native_bf16("cpu") else torch.float32
    ways = {
        "ours": lambda: linear_cross_entropy(hidden, table, None, labels),
        "logits_held": lambda: summed_cross_entropy(F.linear(hidden, table), labels),
        "torch": lambda: F.cross_entropy(F.linear(hidden, table).float(), labels, reduction="sum"),
    }

    def step(way) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = ways[way]()
        loss.backward()

    machine.keep_memory("cpu")
    spent = {way: [] for way in ways}
    for _ in range(PAIRS + 1):
        for way, times in spent.items():
            times.append(seconds(lambda w=way: step(w)))
    over = {f"{way}_over_ours": round(statistics.median(b / a for a, b in zip(spent["ours"][1:], spent[way][1:], strict=True)), 2) for way in ("logits_held", "torch")}
    print(json.dumps({"bench": f"projection and loss, 2048 x 8192 {str(dtype).removeprefix('torch.')}", "pairs": PAIRS, **over}))


if __name__ == "__main__":
    main()
