"""R15: random histories of saving, damaging, dying and resuming: at least one whole checkpoint is always kept, and a
resume takes the newest whole one. What is whole is judged by the bytes that were saved, not by the code under test."""

import os
import random
import shutil
from pathlib import Path

from tests.drills.common import Drill, Tally, answer
from tests.drills.r03_damage import damage

FILES = ["model.safetensors", "optimizer.pt", "trainer_state.json"]


def contents(step: int) -> dict[str, bytes]:
    import torch
    from safetensors.torch import save

    return {"model.safetensors": save({"w": torch.full((8,), float(step))}), "optimizer.pt": bytes([step % 256]) * 64, "trainer_state.json": b'{"global_step": %d}' % step}


def put(folder: Path, step: int, files: dict[str, bytes]) -> None:
    from lmssl import checkpoints

    shutil.rmtree(folder, ignore_errors=True)  # as a save does with what another left there
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    checkpoints.seal(folder, {"step": step, "identity": {}})


def whole(root: Path, step: int) -> bool:
    """Every file of checkpoint-N as it was saved."""
    from lmssl import checkpoints

    folder = root / f"checkpoint-{step}"
    right = folder.is_dir() and all((folder / n).is_file() and (folder / n).read_bytes() == data for n, data in contents(step).items())
    return right and (folder / checkpoints.MANIFEST).is_file() and folder.name not in SPOILT.get(str(root), set())


SPOILT: dict[str, set[str]] = {}
"""Checkpoints whose manifest a drill has damaged."""


def history(root: Path, draw: random.Random) -> str:
    """One random history; "" where it held."""
    from lmssl import checkpoints
    from lmssl.errors import UserError

    step, good, told = 0, set[str](), []
    SPOILT[str(root)] = set()
    spoilt = SPOILT[str(root)]
    for _ in range(draw.randint(4, 14)):
        event = draw.choice(["save", "save", "save", "damage", "die in stage", "die in rename", "die in removal", "resume"])
        told.append(event)
        steps = [s for s in range(1, step + 1) if whole(root, s)]
        if event == "save":
            step += 1
            put(root / f".staging-{step}" / f"checkpoint-{step}", step, contents(step))
            checkpoints.publish(root / f".staging-{step}" / f"checkpoint-{step}", root / f"checkpoint-{step}")
            spoilt.discard(f"checkpoint-{step}")
            good.add(f"checkpoint-{step}")
            checkpoints.rotate(root, good)
        elif event == "damage" and len(steps) > 1:
            # A bit rots in a process that ended; the next one knows of no checkpoint.
            chosen = root / f"checkpoint-{draw.choice(steps)}"
            name = draw.choice([*FILES, checkpoints.MANIFEST])
            kind = draw.choice(["missing", "empty", "half", "zeros", "bit"])
            damage(chosen, name, kind, draw)
            if name == checkpoints.MANIFEST:
                spoilt.add(chosen.name)
            good = set()
        elif event == "die in stage":
            (root / f".staging-{step + 1}" / f"checkpoint-{step + 1}").mkdir(parents=True, exist_ok=True)
            (root / f".staging-{step + 1}" / f"checkpoint-{step + 1}" / "model.safetensors").write_bytes(b"half")
            good = set()
        elif event == "die in rename" and len(steps) > 1 and (root / f"checkpoint-{step}").exists():
            # The old folder is aside, the new one not there yet.
            (root / f"checkpoint-{step}").rename(root / f".old-checkpoint-{step}")
            good = set()
        elif event == "die in removal" and len(steps) > 1:
            (root / f"checkpoint-{steps[0]}" / checkpoints.MANIFEST).unlink()
            good = set()
        elif event == "resume":
            try:
                found, _, _ = checkpoints.newest(root)
            except UserError:
                found = None
            expected = root / f"checkpoint-{steps[-1]}" if steps else None
            if found != expected:
                return f"{told}: resume took {found}, the newest whole one is {expected}"
            if found:
                checkpoints.set_aside(root, checkpoints.step_of(found))
                step, good = checkpoints.step_of(found), {found.name}
        after = [s for s in range(1, step + 1) if whole(root, s)]
        if steps and not after:
            return f"{told}: no whole checkpoint left"
        if event == "save" and after[-1] != step:
            return f"{told}: what was just saved is gone"
    return ""


def ours(tally: Tally, count: int, draw: random.Random, folder: Path) -> None:
    seeds = [draw.random() for _ in range(count)]

    def drill():
        found = []
        for number, seed in enumerate(seeds):
            root = folder / f"run-{number}"
            root.mkdir()
            found.append(history(root, random.Random(seed)))
            shutil.rmtree(root)
        return found

    for miss in answer(drill, folder):
        tally(not miss, miss)


def peer(tally: Tally, count: int, draw: random.Random, folder: Path) -> None:
    """Rotation of the stock Trainer with two kept: the newest two are half-written, a folder is copied late."""

    def drill():
        from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

        found = []
        for number in range(count):
            root = folder / f"run-{number}"
            for step in range(1, 6):
                at = root / f"checkpoint-{step}"
                at.mkdir(parents=True)
                for name, data in contents(step).items():
                    (at / name).write_bytes(data)
                os.utime(at, (step, step))
                if step >= 4:
                    (at / draw.choice(FILES)).write_bytes(b"half")
                if number % 3 == 1 and step == 3:
                    os.utime(root / "checkpoint-1", (99, 99))
                rotate_checkpoints(str(root), save_total_limit=2, use_mtime=number % 3 == 1)
            kept = [p for p in root.iterdir() if all((p / n).read_bytes() == d for n, d in contents(int(p.name[11:])).items())]
            last = get_last_checkpoint(str(root))
            found.append("" if kept and Path(last) in kept else f"whole ones kept: {len(kept)}; it resumes from {Path(last).name}, which is half-written")
        return found

    for miss in answer(drill, folder):
        tally(not miss, miss)


DRILL = Drill("R15 rotation", ours, peer, (60, 200), (3, 12), slice=10)

if __name__ == "__main__":
    DRILL.main()
