"""R8: ranks 1 -> 2 -> 1, workers 0 -> 2, 8x2 -> 4x4 across resumes: every step reads the same rows as one process did."""

import json
import random
from pathlib import Path

from tests.drills import stock
from tests.drills.common import KINDS, Drill, Tally, ranks, stop_at, tokens_of, trainer

STEPS, EVERY, BATCH = 9, 3, 16


def reading(made, out: Path):
    """The trainer, which notes the rows of every micro-batch that it trains on."""
    import hashlib

    notes, original = out.parent / f"{out.name}-rows-{made.args.process_index}.jsonl", made.training_step

    def training_step(model, inputs, *rest):
        ids, labels = inputs["input_ids"], inputs["labels"]
        rows = [hashlib.sha256(bytes(row.tolist().__repr__(), "ascii")).hexdigest()[:16] for row in ids]
        with notes.open("a") as stream:
            stream.write(json.dumps([made.state.global_step, rows, int((labels != -100).sum())]) + "\n")
        return original(model, inputs, *rest)

    made.training_step = training_step
    return made


def steps_of(out: Path) -> dict[int, tuple]:
    """Step -> its rows as a sorted tuple, and its number of labels."""
    found: dict[int, list] = {}
    counts: dict[int, int] = {}
    for path in out.parent.glob(f"{out.name}-rows-*.jsonl"):
        for line in path.read_text().splitlines():
            step, rows, labels = json.loads(line)
            found.setdefault(step, []).extend(rows)
            counts[step] = counts.get(step, 0) + labels
    return {step: (tuple(sorted(rows)), counts[step]) for step, rows in found.items()}


def phases(draw: random.Random) -> list[tuple[int, int, int, int]]:
    """Three of (ranks, workers, batch a process, micro-batches), all of 16 rows a step."""
    splits = {1: [(16, 1), (8, 2), (4, 4), (2, 8)], 2: [(8, 1), (4, 2), (2, 4)]}
    worlds = draw.choice([(1, 2, 1), (2, 1, 2), (1, 1, 2), (2, 2, 1)])
    return [(world, draw.choice([0, 2]), *draw.choice(splits[world])) for world in worlds]


def ours(tally: Tally, count: int, draw: random.Random, folder: Path) -> None:
    import numpy as np

    tokens_of(folder)
    os_environment = {"OMP_NUM_THREADS": "1"}

    def drill(architecture: str, out: Path, until: int, workers: int, micro: int, accumulate: int, resume: bool):
        keys = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": EVERY, "dataloader_num_workers": workers, "per_device_train_batch_size": micro}
        import torch

        torch.set_num_threads(1)
        made = reading(trainer(architecture, tokens_of(folder), out, gradient_accumulation_steps=accumulate, **keys), out)
        made.add_callback(stop_at(until, save=True))
        made.run(made.resume_point() if resume else None)
        if until == STEPS:
            made.save_model(str(out))

    wholes: dict[str, Path] = {}
    for number in range(count):
        architecture = list(KINDS.values())[number % 3]
        if architecture not in wholes:
            wholes[architecture] = folder / f"whole-{architecture}"
            ranks(1, lambda a=architecture, o=wholes[architecture]: drill(a, o, STEPS, 0, BATCH, 1, False), folder, environment=os_environment)
        out, chosen = folder / f"run-{number}", phases(draw)
        for k, (world, workers, micro, accumulate) in enumerate(chosen):
            work = lambda a=architecture, o=out, k=k, w=workers, m=micro, g=accumulate: drill(a, o, (k + 1) * EVERY, w, m, g, k > 0)  # noqa: E731
            ranks(world, work, folder, environment=os_environment)
        expected, found = steps_of(wholes[architecture]), steps_of(out)
        wrong = [step for step in expected if found.get(step) != expected[step]]
        from safetensors.numpy import load_file

        a, b = load_file(wholes[architecture] / "model.safetensors"), load_file(out / "model.safetensors")
        # Dropout is keyed by rank and layout by rounding, so weights are near, not equal.
        near = float(np.sqrt(sum(((a[k] - b[k]) ** 2).sum() for k in a) / sum((a[k] ** 2).sum() for k in a)))
        tally(not wrong and near < 0.1, f"{architecture} {chosen}: other rows at steps {wrong}; weights {near:.2e} apart")


def peer(tally: Tally, count: int, draw: random.Random, folder: Path) -> None:
    def drill(out: Path, until: int, workers: int, micro: int, accumulate: int, resume: bool):
        keys = {"max_steps": STEPS, "save_steps": EVERY, "dataloader_num_workers": workers, "per_device_train_batch_size": micro}
        made = reading(stock.trainer(folder, "masked", out, gradient_accumulation_steps=accumulate, callbacks=[stop_at(until, save=True)], **keys), out)
        made.train(resume_from_checkpoint=True if resume else None)

    whole = folder / "whole"
    ranks(1, lambda: drill(whole, STEPS, 0, BATCH, 1, False), folder)
    for number in range(count):
        out, chosen = folder / f"run-{number}", phases(draw)
        try:
            for k, (world, workers, micro, accumulate) in enumerate(chosen):
                ranks(world, lambda k=k, w=workers, m=micro, g=accumulate, o=out: drill(o, (k + 1) * EVERY, w, m, g, k > 0), folder)
        except RuntimeError as error:
            tally(False, f"{chosen}: {str(error)[-200:]}")
            continue
        expected, found = steps_of(whole), steps_of(out)
        wrong = [step for step in expected if found.get(step) != expected[step]]
        tally(not wrong, f"{chosen}: other rows at steps {wrong}")


DRILL = Drill("R8 elastic", ours, peer, (4, 18), (3, 9), slice=1)

if __name__ == "__main__":
    DRILL.main()
