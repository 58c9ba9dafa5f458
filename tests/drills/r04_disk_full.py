"""R4: the disk is full (a real limit on file size) in a checkpoint, in the final model, in preparation: one line that
says so, exit status 3, the older checkpoint whole, nothing half-written left, and the next resume works."""

import random
import resource
from pathlib import Path

from tests.drills import stock
from tests.drills.common import Child, Drill, Tally, answer, command, fresh, lmssl, recipe, same

STEPS, LOWEST = 20, 2**16


def limited(size: int, owner, name: str, call: int, work):
    """`work`, with the file size limited from the n-th call of `owner.name` on."""

    def run():
        original, seen = getattr(owner(), name), []

        def spoilt(*args, **kwargs):
            seen.append(1)
            if len(seen) == call:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            return original(*args, **kwargs)

        setattr(owner(), name, spoilt)
        return work()

    return run


def trainer_class():
    from lmssl.trainer import ExactTrainer

    return ExactTrainer


def runs_module():
    import lmssl.runs

    return lmssl.runs


def writer_class():
    from lmssl.data import preparation

    return preparation._Writer


REACHED = {"checkpoint": (trainer_class, "_save_checkpoint"), "final model": (runs_module, "_finish"), "preparation": (writer_class, "__init__")}
"""What writes in each case: where it lives, and its name there."""


def ours(tally: Tally, count: int, draw: random.Random, folder: Path) -> None:
    from lmssl import checkpoints

    whole = folder / "whole"
    lmssl(folder, "pretrain", recipe(folder, "masked", whole, max_steps=STEPS, save_steps=5))
    largest = max(p.stat().st_size for p in (whole / f"checkpoint-{STEPS}").iterdir())
    for number in range(count):
        out, size = folder / f"run-{number}", draw.randint(LOWEST, largest - 1)
        path = recipe(folder, "masked", out, max_steps=STEPS, save_steps=5)
        case = ["checkpoint", "checkpoint", "checkpoint", "final model", "preparation"][number % 5]
        if case == "preparation":
            import os

            os.environ["LMSSL_CACHE"] = str(fresh(folder / f"cache-{number}"))
            work = limited(2048, *REACHED[case], 1, command("prepare", path))
        elif case == "final model":
            size = draw.randint(LOWEST, (whole / "model.safetensors").stat().st_size - 1)
            work = limited(size, *REACHED[case], 1, command("pretrain", path))
        else:
            work = limited(size, *REACHED[case], draw.randint(2, 4), command("pretrain", path))
        child = Child(work, folder)
        code = child.wait()
        errors = [line for line in child.text().splitlines() if line.startswith("lmssl: error")]
        clear = code == 3 and len(errors) == 1 and "cannot be written" in errors[0] and "Traceback" not in child.text()
        saved = checkpoints.all_of(out)
        intact = answer(lambda saved=saved: [bool(checkpoints.verify(p)) for p in saved[:1]], folder) == [True] or case == "preparation"
        left = [p.name for p in (*out.glob(".staging*"), *(folder / f"cache-{number}").glob("tokens/*.part*"))]
        resumed = Child(command("pretrain", path, *([] if case == "preparation" else ["--resume"])), folder)
        finished = resumed.wait() == 0 and same(whole, out)
        tally(clear and intact and not left and finished, f"{case}, limit {size}: exit {code}, {errors}, intact {intact}, left {left}, resumed {finished}: {child.text()[-300:]}")


def peer(tally: Tally, count: int, draw: random.Random, folder: Path) -> None:
    import transformers

    whole = folder / "whole"
    assert Child(lambda: stock.run(folder, "next_token", whole, max_steps=STEPS, save_steps=5), folder).wait() == 0
    largest = max(p.stat().st_size for p in (whole / f"checkpoint-{STEPS}").iterdir())
    for number in range(count):
        out, size = folder / f"run-{number}", draw.randint(LOWEST, largest - 1)
        work = limited(
            size, lambda: transformers.Trainer, "_save_checkpoint", draw.randint(2, 4), lambda out=out: stock.run(folder, "next_token", out, max_steps=STEPS, save_steps=5)
        )
        child = Child(work, folder)
        code = child.wait()
        clear = code != 0 and "Traceback" not in child.text()
        resumed = Child(lambda out=out: stock.run(folder, "next_token", out, resume=True, max_steps=STEPS, save_steps=5), folder)
        finished = resumed.wait() == 0 and same(whole, out)
        tally(clear and finished, f"limit {size}: exit {code}, {'a clear line' if clear else 'a traceback'}, {'resumed' if finished else 'not resumable'}")


DRILL = Drill("R4 disk full", ours, peer, (5, 10), (2, 4), slice=2)

if __name__ == "__main__":
    DRILL.main()
