"""R14: a data worker that raises, exits, is killed or hangs: named, the checkpoint before it good, a hang timed out,
and the resumed run the same as one that never met it."""

import os
import random
import re
import signal
import time
from pathlib import Path

from tests.drills import stock
from tests.drills.common import Child, Drill, Tally, same, tokens_of, trainer

KINDS = {
    "raise": r"the data of step \d+ cannot be made: ZeroDivisionError.*r14_workers",
    "exit": r"the data of step \d+ cannot be made: .*worker.*exited unexpectedly",
    "kill": r"the data of step \d+ cannot be made: .*worker.*(killed by signal|exited unexpectedly)",  # torch says either, whichever of its two looks comes first
    "hang": r"the data of step \d+ cannot be made: .*timed out.*a data worker hangs \(trainer.worker_timeout",
}
STEPS, TIMEOUT = 12, 3


def failing(dataset, kind: str, at: int):
    """The dataset, whose item `at` brings its worker down."""
    original = type(dataset).__getitem__

    class Failing(type(dataset)):
        def __getitem__(self, i):
            if i == at:
                if kind == "raise":
                    return 1 // 0
                if kind == "exit":
                    os._exit(3)
                if kind == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(1000)
            return original(self, i)

    dataset.__class__ = Failing
    return dataset


def ours(tally: Tally, count: int, draw: random.Random, folder: Path) -> None:
    tokens_of(folder)

    def run(out: Path, kind: str = "", at: int = 0, resume: bool = False):
        def work():
            from lmssl import checkpoints
            from lmssl.errors import Stopped

            made = trainer("bert", tokens_of(folder), out, max_steps=STEPS, save_strategy="steps", save_steps=2, dataloader_num_workers=2, worker_timeout=TIMEOUT)
            if kind:
                failing(made.train_dataset, kind, at)
            try:
                made.run(made.resume_point() if resume else None)
            except Stopped as error:
                print(f"stopped: {error}", flush=True)
                checkpoints.verify(checkpoints.all_of(out)[0])
                return 3
            made.save_model(str(out))
            return 0

        return work

    whole = folder / "whole"
    child = Child(run(whole), folder)
    assert child.wait() == 0, child.text()
    for number in range(count):
        kind, out, at = list(KINDS)[number % 4], folder / f"run-{number}", draw.randint(32, 4 * STEPS - 1)
        begun = time.time()
        child = Child(run(out, kind, at), folder)
        code, seconds = child.wait(60), time.time() - begun
        named = re.search(KINDS[kind], child.text()) and "the last good checkpoint is" in child.text()
        again = Child(run(out, resume=True), folder)
        finished = again.wait() == 0 and same(whole, out)
        tally(code == 3 and bool(named) and finished and seconds < 45, f"{kind} at item {at}: exit {code} after {seconds:.0f} s, resumed {finished}: {child.text()[-300:]}")


def peer(tally: Tally, count: int, draw: random.Random, folder: Path) -> None:
    for number in range(count):
        kind, out, at = list(KINDS)[number % 4], folder / f"run-{number}", draw.randint(32, 4 * STEPS - 1)

        def work(kind=kind, out=out, at=at):
            import torch

            class Rows(torch.utils.data.Dataset):
                def __init__(self, rows):
                    self.rows = rows

                def __len__(self):
                    return len(self.rows)

                def __getitem__(self, i):
                    return self.rows[i]

            data = failing(Rows(stock.rows(folder)[0]), kind, at)
            made = stock.trainer(folder, "next_token", out, data=data, max_steps=STEPS, save_steps=2, dataloader_num_workers=2)
            made.args.train_sampling_strategy = "sequential"
            made.train()

        child = Child(work, folder)
        code = child.wait(25)
        named = code not in (0, -9) and bool(re.search(r"worker|ZeroDivisionError", child.text()))
        tally(named, f"{kind}: {'still waiting after 25 s' if code == -9 else f'exit {code}'}")


DRILL = Drill("R14 workers", ours, peer, (4, 16), (4, 8), slice=1)

if __name__ == "__main__":
    DRILL.main()
