"""R5: SIGTERM or SIGINT at a random moment: saved at the step boundary, exit status 128 + signal, and the resumed run
ends with the same bits. A quarter of them hit a fine-tuning."""

import json
import random
import signal
import time
from pathlib import Path

from tests.drills import stock
from tests.drills.common import Child, Drill, Tally, command, lmssl, recipe, same

STEPS = 40


def finetuning(folder: Path, backbone: Path, out: Path) -> Path:
    rows = [{"text": f"film {n} was {'good' if n % 2 else 'bad'} and {n % 7}", "label": n % 2} for n in range(80)]
    (folder / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / f"{out.name}.yaml"
    path.write_text(
        f"task: {{name: sentiment, labels: [40], seeds: 2}}\ndata: {{train: {folder / 'labelled.jsonl'}, test: 20, max_length: 32}}\nmodel: {{from: {backbone}}}\n"
        f"trainer: {{output_dir: {out}, max_steps: {STEPS}, save_steps: 10, per_device_train_batch_size: 4, bf16: false}}\n"
    )
    return path


def ours(tally: Tally, count: int, draw: random.Random, folder: Path) -> None:
    whole = folder / "whole"
    lmssl(folder, "pretrain", recipe(folder, "span_corruption", whole, max_steps=STEPS, save_steps=1000))
    tuned = folder / "tuned"
    if count > 3:  # a signal in fine-tuning is every fourth case
        lmssl(folder, "finetune", finetuning(folder, whole, tuned))
    for number in range(count):
        tuning, signum = number % 4 == 3, draw.choice([signal.SIGTERM, signal.SIGINT])
        out = folder / f"run-{number}"
        verb, path = ("finetune", finetuning(folder, whole, out)) if tuning else ("pretrain", recipe(folder, "span_corruption", out, max_steps=STEPS, save_steps=1000))
        child = Child(command(verb, path), folder)
        if tuning:
            child.until("1 of 4" if draw.random() < 0.5 else "to train on:")
            time.sleep(0.2 + draw.random() * 0.15)
        else:
            child.until(f"step {draw.randint(1, STEPS - 3)}/")
            time.sleep(draw.random() * 0.02)
        child.kill(signum)
        code = child.wait()
        saved = f"lmssl: {signum.name}: saved " in child.text() and list(out.glob("**/checkpoint-*/lmssl-manifest.json"))
        between = tuning and "stopped outside training steps" in child.text()  # while a run was being scored
        lmssl(folder, verb, path, "--resume")
        if tuning:
            results = [[(r["seed"], r["init"], r["score"]) for r in json.loads((p / "metrics.json").read_text())["results"]] for p in (tuned, out)]
            identical = results[0] == results[1] and same(tuned, out)
        else:
            identical = same(whole, out)
        held = code == 128 + signum and bool(saved or between) and identical
        tally(held, f"{signum.name} in {verb}: exit {code}, saved {bool(saved)}, identical {identical}: {child.text()[-300:]}")


def peer(tally: Tally, count: int, draw: random.Random, folder: Path) -> None:
    whole = folder / "whole"
    keys = {"max_steps": STEPS, "save_steps": 1000}
    assert Child(lambda: stock.run(folder, "next_token", whole, **keys), folder).wait() == 0
    for number in range(count):
        out, signum = folder / f"run-{number}", draw.choice([signal.SIGTERM, signal.SIGINT])
        child = Child(lambda out=out: stock.run(folder, "next_token", out, **keys), folder)
        step = draw.randint(1, STEPS - 3)
        while not child.ended() and child.text().count("'loss'") < step:
            time.sleep(0.002)
        child.kill(signum)
        code = child.wait()
        saved = bool(list(out.glob("checkpoint-*")))
        tally(saved, f"{signum.name}: exit {code}, nothing saved")


DRILL = Drill("R5 signals", ours, peer, (8, 20), (4, 10), slice=1)

if __name__ == "__main__":
    DRILL.main()
