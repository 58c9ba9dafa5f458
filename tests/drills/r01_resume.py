"""R1: SIGKILL at a random micro-step, resume: the final weights are those of a run that was never killed, bit for bit.

Three objectives, one epoch or several, 0 or 2 workers, 1 or 4 micro-batches a step; a few of the kills compiled.
"""

import itertools
import random
import time
from pathlib import Path

from tests.drills import stock
from tests.drills.common import Child, Drill, Tally, command, lmssl, recipe, same

STEPS = 40
CASES = list(itertools.product(["next_token", "masked", "span_corruption"], ["text.txt", "little.txt"], [0, 2], [1, 4]))


def killed(child: Child, draw: random.Random, steps: int) -> bool:
    """Kill at a random moment of a random step; False where it came too late."""
    if not child.until(f"step {draw.randint(1, steps - 2)}/"):
        raise RuntimeError(child.text()[-2000:])
    time.sleep(draw.random() * 0.03)
    child.kill()
    return child.wait() == -9


def ours(tally: Tally, count: int, draw: random.Random, folder: Path) -> None:
    cases = [draw.sample(CASES, len(CASES)) for _ in range(-(-count // len(CASES)))]
    todo = [case for block in cases for case in block][:count]
    compiled = [(kind, "text.txt", 0, 1) for kind in ("masked", "next_token", "span_corruption")][: 0 if count < 4 else 1 if count < 24 else 3]
    tally.more = {"steps": STEPS, "compiled": len(compiled)}
    whole: dict[tuple, Path] = {}
    for number, (kind, text, workers, accumulate) in enumerate(todo + compiled):
        keys = {"gradient_accumulation_steps": accumulate, "max_steps": STEPS} | ({"torch_compile": "true"} if number >= len(todo) else {})
        key = (kind, text, accumulate, number >= len(todo))
        if key not in whole:
            whole[key] = folder / "-".join(map(str, ("whole", *key)))
            lmssl(folder, "pretrain", recipe(folder, kind, whole[key], text, **keys))
        out = folder / f"run-{number}"
        path = recipe(folder, kind, out, text, dataloader_num_workers=workers, **keys)
        kills = 0
        for _ in range(draw.choice([1, 1, 1, 2])):
            kills += killed(Child(command("pretrain", path, *(["--resume"] if kills else [])), folder), draw, STEPS) if not kills else again(path, folder, draw)
        lmssl(folder, "pretrain", path, "--resume")
        tally(kills > 0 and same(whole[key], out), f"{kind} {text} workers {workers} accumulate {accumulate} {'compiled' if key[3] else ''}: {kills} kills")


def again(path: Path, folder: Path, draw: random.Random) -> bool:
    """A second kill, some time after the resume."""
    child = Child(command("pretrain", path, "--resume"), folder)
    time.sleep(0.4 + draw.random() * 0.4)
    child.kill()
    return child.wait() == -9


def peer(tally: Tally, count: int, draw: random.Random, folder: Path) -> None:
    whole: dict[tuple, Path] = {}
    for number in range(count):
        kind, text, workers, accumulate = draw.choice([c for c in CASES if c[0] != "span_corruption"])
        keys = {"gradient_accumulation_steps": accumulate, "dataloader_num_workers": workers, "text": text, "max_steps": STEPS}
        key = (kind, text, accumulate)
        if key not in whole:
            whole[key] = folder / f"whole-{len(whole)}"
            assert Child(lambda k=kind, o=whole[key], v=keys: stock.run(folder, k, o, **v), folder).wait() == 0
        out = folder / f"run-{number}"
        child = Child(lambda k=kind, o=out, v=keys: stock.run(folder, k, o, **v), folder)
        step = draw.randint(8, STEPS - 2)
        while not child.ended() and child.text().count("'loss'") < step:
            time.sleep(0.002)
        child.kill()
        child.wait()
        resumed = Child(lambda k=kind, o=out, v=keys: stock.run(folder, k, o, resume=True, **v), folder)
        tally(resumed.wait() == 0 and same(whole[key], out), f"{kind} {text} workers {workers} accumulate {accumulate}, killed after step {step}")


DRILL = Drill("R1 resume", ours, peer, (8, 60), (8, 24), slice=1)

if __name__ == "__main__":
    DRILL.main()
