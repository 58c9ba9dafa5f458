"""R2: SIGKILL while a checkpoint is being written, half of the time over one that exists: every run resumes, loses at
most that one save, and ends with the weights of a run that was never killed."""

import random
import re
import time
from pathlib import Path

from tests.drills import stock
from tests.drills.common import Child, Drill, Tally, answer, same, stop_at, tokens_of, trainer

STEPS = 6
WIDE = {"n_embd": 256}
"""So that a save takes long enough to be hit: the weights are 9 MB, the optimizer twice that."""


def marked(made):
    """A trainer that says on stdout when a save begins, and when the checkpoint is in its place."""

    def saying(name: str, before: str, after: str) -> None:
        original = getattr(made, name)

        def said(*args, **kwargs):
            step = made.state.global_step if name == "_save_checkpoint" else int(args[0].name.rpartition("-")[2])
            print(f"{before} {step}\n" if before else "", end="", flush=True)
            original(*args, **kwargs)
            print(f"{after} {step}\n" if after else "", end="", flush=True)

        setattr(made, name, said)

    if hasattr(made, "_seal"):
        saying("_save_checkpoint", "begin", "")
        saying("_seal", "", "end")
    else:
        saying("_save_checkpoint", "begin", "end")
    return made


def train(folder: Path, out: Path, begin: int | None = None, resume: bool = False):
    def work():
        made = marked(trainer("gpt2", tokens_of(folder), out, width=WIDE, max_steps=STEPS, save_strategy="steps", save_steps=1))
        point = made.resume_point() if resume else out / f"checkpoint-{begin}" if begin else None
        if resume:
            print(f"resumed {point}", flush=True)
        made.run(point)
        made.save_model(str(out))

    return work


def seconds_of_a_save(child: Child) -> float:
    """Of a run that is left to end."""
    child.until("begin 2\n")
    begun = time.time()
    child.until("end 2\n")
    span = time.time() - begun
    assert child.wait() == 0, child.text()
    return span


def kill_in_save(child: Child, step: int, draw: random.Random, span: float) -> bool:
    """SIGKILL somewhere in the save of a step; whether it fell inside."""
    child.until(f"begin {step}\n")
    time.sleep(draw.random() * span)
    child.kill()
    child.wait()
    return f"end {step}\n" not in child.text()


def ours(tally: Tally, count: int, draw: random.Random, folder: Path) -> None:
    tokens_of(folder)
    whole = folder / "whole"
    span = seconds_of_a_save(Child(train(folder, whole), folder))
    inside = 0
    for number in range(count):
        out, over = folder / f"run-{number}", number % 2 == 1
        step = draw.randint(2, STEPS - 1)
        if over:
            # A run that went on to the next step, and is set back by one: it writes over the checkpoint that is there.
            assert answer(lambda out=out, step=step: stop_after(folder, out, step), folder) == step
        child = Child(train(folder, out, step - 1 if over else None), folder)
        inside += kill_in_save(child, step, draw, span)
        resumed = Child(train(folder, out, resume=True), folder)
        code = resumed.wait()
        found = re.search(r"resumed .*checkpoint-(\d+)", resumed.text())
        lost = step - int(found[1]) if found else step
        left = [p.name for p in out.glob(".*")]
        held = code == 0 and lost <= 1 and not left and same(whole, out)
        tally(held, f"save of step {step}{' over another' if over else ''}: exit {code}, {lost} saves lost, {left} left over: {resumed.text()[-200:]}")
    if count >= 12:
        tally(inside >= count // 3, f"only {inside} of {count} kills fell inside a save")
    tally.more = {"inside_the_save": inside, "save_seconds": round(span, 3)}


def stop_after(folder: Path, out: Path, step: int) -> int:
    made = trainer("gpt2", tokens_of(folder), out, width=WIDE, max_steps=step, save_strategy="steps", save_steps=1)
    made.args.max_steps = STEPS  # the schedule of the whole run
    made.add_callback(stop_at(step))
    made.run()
    return made.state.global_step


def peer(tally: Tally, count: int, draw: random.Random, folder: Path) -> None:
    def run(out: Path, resume: bool = False):
        def work():
            made = marked(stock.trainer(folder, "next_token", out, width=WIDE, max_steps=STEPS, save_steps=1))
            made.train(resume_from_checkpoint=True if resume else None)
            made.save_model(str(out))

        return work

    whole = folder / "whole"
    span = seconds_of_a_save(Child(run(whole), folder))
    inside = 0
    for number in range(count):
        out, step = folder / f"run-{number}", draw.randint(2, STEPS - 1)
        inside += kill_in_save(Child(run(out), folder), step, draw, span)
        resumed = Child(run(out, resume=True), folder)
        tally(resumed.wait() == 0 and same(whole, out), f"save of step {step}: {resumed.text()[-200:]}")
    tally.more = {"inside_the_save": inside, "save_seconds": round(span, 3)}


DRILL = Drill("R2 kill while saving", ours, peer, (12, 60), (12, 30), slice=2)

if __name__ == "__main__":
    DRILL.main()
