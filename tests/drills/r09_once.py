"""R9: every token of every document exactly once an epoch, in the order that the stream says, whatever the ranks, the
workers and the batch, and where the number of rows is divisible by none of them."""

import random
from collections import Counter
from pathlib import Path

from tests.drills import stock
from tests.drills.common import Drill, Tally, answer, ranks


def numbered(folder: Path, documents: int, draw: random.Random) -> list[list[int]]:
    """A token set whose every token occurs once: the numbers 0, 1, 2, ... in documents of random length."""
    import lmssl
    from lmssl import tokenization

    at, cut = 0, []
    for _ in range(documents):
        size = draw.randint(1, 60)
        cut.append(list(range(at, at + size)))
        at += size
    words = tokenization.train([" ".join(str(n) for n in range(10))] * 20, "bpe", 400)
    lmssl.from_iterable([" ".join(map(str, doc)) for doc in cut], words, folder / "numbered", 0.001)
    return cut


def ours(tally: Tally, count: int, draw: random.Random, folder: Path) -> None:
    def epoch(world: int, workers: int, micro: int, length: int, name: str):
        """(item, ids) that this rank trains on in two epochs."""
        import lmssl
        from tests import helpers

        tokens = lmssl.TokenSet(folder / name / "numbered")
        rows = tokens.rows(length)
        batch = micro * world
        args = helpers.arguments(folder / "out", max_steps=-(-2 * rows // batch), per_device_train_batch_size=micro, dataloader_num_workers=workers, learning_rate=1e-9)
        made = lmssl.PretrainTrainer(helpers.small_model("gpt2", tokens.vocab(), length), helpers.OBJECTIVE["gpt2"], tokens, args, length, quiet=True)
        found, wrong, original = [], [], made.training_step

        def training_step(model, inputs, *rest):
            at = made.state.global_step * batch + made.args.process_index * micro
            found.extend([at + k, row.tolist(), seg.tolist()] for k, (row, seg) in enumerate(zip(inputs["input_ids"], inputs["segments"], strict=True)))
            wrong.extend(at + k for k, row in enumerate(inputs["input_ids"]) if row.tolist() != made.train_dataset.row(at + k).ids.tolist())
            return original(model, inputs, *rest)

        made.training_step = training_step
        made.run()
        return found, rows, wrong

    for number in range(count):
        name, documents, length = f"set-{number}", draw.randint(5, 60), draw.choice([16, 24, 32])
        (folder / name).mkdir()
        seed = draw.random()
        cut = answer(lambda f=folder / name, d=documents, s=seed: numbered(f, d, random.Random(s)), folder)
        world, workers, micro = draw.choice([1, 2, 3]), draw.choice([0, 2]), draw.choice([1, 2, 3, 5])
        parts = ranks(world, lambda w=world, k=workers, m=micro, n=length, f=name: epoch(w, k, m, n, f), folder)
        rows = parts[0][1]
        items = {item: [i for i, s in zip(ids, segs, strict=True) if s] for found, *_ in parts for item, ids, segs in found}
        repeated, wrong = sum(len(found) for found, *_ in parts) - len(items), sum(len(part[2]) for part in parts)
        held, why = not (repeated or wrong), f"{repeated} items twice, {wrong} not in the stream's order"
        for part in range(2):
            seen = Counter(tuple(items[i]) for i in range(part * rows, (part + 1) * rows))
            ordered = answer(lambda f=name, n=length: [row_ids(folder / f, n), []], folder)[0]
            if seen != Counter(map(tuple, ordered)):
                held, why = False, f"epoch {part}: other rows"
            words = answer(lambda f=name, o=ordered, n=length: decoded(folder / f, o + row_ids(folder / f, n, held_out=True)), folder)
            expected = sum(len(doc) for doc in cut)
            if sorted(words) != list(range(expected)):
                held, why = False, f"epoch {part}: {len(words)} tokens of {expected}"
        tally(held, f"{documents} documents, {rows} rows of {length}, {world} ranks, {workers} workers, batch {micro}: {why}")


def row_ids(folder: Path, length: int, held_out: bool = False) -> list[list[int]]:
    """The rows, cut by the token set itself; that they and the held-out ones hold every token once is checked beside."""
    import lmssl

    tokens = lmssl.TokenSet(folder / "numbered", "held_out" if held_out else "train")
    rows = [tokens.row(k, length, tokens.vocab().pad) for k in range(tokens.rows(length))]
    return [row.ids[row.segments > 0].tolist() for row in rows]


def decoded(folder: Path, rows: list[list[int]]) -> list[int]:
    """Every number in the rows; documents are apart by their special tokens."""
    import lmssl

    tokens = lmssl.TokenSet(folder / "numbered")
    special = {i for name, i in ((n, tokens.tokenizer.id(n)) for n in ("bos", "eos", "pad")) if i is not None}
    numbers, held = [], []
    for i in [*(i for row in rows for i in row), *special]:
        if i in special:
            numbers += [int(w) for w in tokens.tokenizer.decode(held).split()]
            held = []
        else:
            held.append(i)
    return numbers


def peer(tally: Tally, count: int, draw: random.Random, folder: Path) -> None:
    """One epoch of the stock Trainer over group_texts rows, several ranks: rows twice, tokens dropped."""

    def epoch(rows: int, world: int, micro: int):
        import datasets

        data = datasets.Dataset.from_dict({"input_ids": [[k] * 8 for k in range(rows)]})
        made = stock.trainer(
            folder, "next_token", folder / "out", data=data, max_steps=-1, num_train_epochs=1, per_device_train_batch_size=micro, learning_rate=1e-9, save_strategy="no"
        )
        found, original = [], made.training_step

        def training_step(model, inputs, *rest):
            found.extend(int(row[0]) for row in inputs["input_ids"])
            return original(model, inputs, *rest)

        made.training_step = training_step
        made.train()
        return found

    twice = 0
    for _ in range(count):
        rows, world, micro = draw.randint(20, 70), draw.choice([2, 3]), draw.choice([2, 3, 5])
        seen = Counter(k for part in ranks(world, lambda r=rows, w=world, m=micro: epoch(r, w, m), folder) for k in part)
        again, lost = sum(v - 1 for v in seen.values()), rows - len(seen)
        twice += again
        tally(not again and not lost, f"{rows} rows, {world} ranks, batch {micro}: {again} twice, {lost} never")
    tally.more = {"rows_twice": twice}


DRILL = Drill("R9 once", ours, peer, (4, 20), (3, 10), slice=1)

if __name__ == "__main__":
    DRILL.main()
