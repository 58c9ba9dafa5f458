"""R3: a checkpoint damaged in any file and any way is detected, the file named, and the newest good one taken; where
none is good there is one clear error and no silent fresh start."""

import contextlib
import random
import shutil
from pathlib import Path

from tests.drills import stock
from tests.drills.common import Child, Drill, Tally, answer, same, tokens_of, trainer

STEPS = 6
KINDS = ["missing", "empty", "half", "zeros", "bit", "other step", "nan", "dropped", "renamed", "nan, sealed", "dropped, sealed", "renamed, sealed"]


def damage(folder: Path, name: str, kind: str, draw: random.Random) -> None:
    """Spoil one file of a checkpoint; "sealed": with a manifest that agrees."""
    path = folder / name
    if kind == "missing":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "zeros":
        path.write_bytes(bytes(path.stat().st_size))
    elif kind == "bit":
        data = bytearray(path.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
    elif kind == "other step":
        other = next(p for p in sorted(folder.parent.glob("checkpoint-*")) if p != folder)
        shutil.copy(other / name, path)
    else:
        tensors(path, kind, draw.random())
        if "sealed" in kind:
            seal(folder)


def tensors(path: Path, kind: str, at: float) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    found = load_file(path)
    name = sorted(found)[int(at * len(found))]
    if kind.startswith("nan"):
        found[name].reshape(-1)[0] = torch.nan
    else:
        value = found.pop(name)
        if kind.startswith("renamed"):
            found[name + "x"] = value
    save_file(found, path, metadata={"format": "pt"})


def seal(folder: Path) -> None:
    from lmssl import checkpoints

    facts = {k: v for k, v in checkpoints.read_signed(folder / checkpoints.MANIFEST).items() if k != "files"}
    checkpoints.seal(folder, facts)


def ours(tally: Tally, count: int, draw: random.Random, folder: Path) -> None:
    tokens_of(folder)

    def drill():
        from lmssl.errors import UserError

        keys = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2}
        whole = trainer("bert", tokens_of(folder), folder / "whole", **keys)
        whole.run()
        whole.save_model(str(folder / "whole"))
        cut = trainer("bert", tokens_of(folder), folder / "cut", **keys)
        cut.add_callback(_cut_after(4))
        with contextlib.suppress(KeyboardInterrupt):
            cut.run()
        files = sorted(p.name for p in (folder / "cut" / "checkpoint-4").iterdir())
        found = []
        for number in range(count):
            kind = KINDS[number % len(KINDS)]
            name = "model.safetensors" if kind.split(",")[0] in ("nan", "dropped", "renamed") else draw.choice(files)
            if kind == "other step":  # of a file that is the same at every step this would be no damage
                name = draw.choice([n for n in files if len({(folder / "cut" / f"checkpoint-{step}" / n).read_bytes() for step in (2, 4)}) == 2])
            out = folder / f"run-{number}"
            shutil.copytree(folder / "cut", out)
            damage(out / "checkpoint-4", name, kind, draw)
            again = trainer("bert", tokens_of(folder), out, **keys)
            with _caught() as text:
                point = again.resume_point()
            named = f"checkpoint-4/{name}" in text.getvalue()
            again.run(point)
            again.save_model(str(out))
            recovered = point is not None and point.name == "checkpoint-2" and same(folder / "whole", out)
            found.append([named and recovered, f"{kind} in {name}: named {named}, resumed from {point}, identical {recovered}: {text.getvalue()[:200]}"])
            if number % 12 == 0:
                # The other one as well: nothing is left to resume from.
                shutil.rmtree(out)
                shutil.copytree(folder / "cut", out)
                for step in (2, 4):
                    damage(out / f"checkpoint-{step}", "model.safetensors", "half", draw)
                try:
                    trainer("bert", tokens_of(folder), out, **keys).resume_point()
                    found.append([False, "none whole: no error"])
                except UserError as error:
                    found.append(["no checkpoint is whole" in str(error), f"none whole: {error}"])
            shutil.rmtree(out)
        return found

    for held, miss in answer(drill, folder):
        tally(held, miss)


class _caught:
    """What lmssl logs inside."""

    def __enter__(self):
        import io
        import logging

        self.text = io.StringIO()
        self.handler = logging.StreamHandler(self.text)
        logging.getLogger("lmssl").addHandler(self.handler)
        return self.text

    def __exit__(self, *error):
        import logging

        logging.getLogger("lmssl").removeHandler(self.handler)


def _cut_after(step: int):
    from transformers import TrainerCallback

    class Cut(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            pass

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise KeyboardInterrupt

    return Cut()


def peer(tally: Tally, count: int, draw: random.Random, folder: Path) -> None:
    keys = {"max_steps": STEPS, "save_steps": 2}
    whole, cut = folder / "whole", folder / "cut"
    assert Child(lambda: stock.run(folder, "next_token", whole, **keys), folder).wait() == 0
    Child(lambda: stock.run(folder, "next_token", cut, callbacks=[_cut_after(4)], **keys), folder).wait()
    files = sorted(p.name for p in (cut / "checkpoint-4").iterdir())
    silent = crashed = 0
    for number in range(count):
        kind = [k for k in KINDS if "sealed" not in k][number % 9]
        name = "model.safetensors" if kind in ("nan", "dropped", "renamed") else draw.choice(files)
        out = folder / f"run-{number}"
        shutil.copytree(cut, out)
        answer(lambda out=out, name=name, kind=kind: damage(out / "checkpoint-4", name, kind, draw), folder)
        child = Child(lambda out=out: stock.run(folder, "next_token", out, resume=True, **keys), folder)
        code = child.wait()
        recovered = code == 0 and same(whole, out)
        silent += code == 0 and not recovered
        crashed += code != 0
        tally(recovered, f"{kind} in {name}: exit {code}, not recovered")
    tally.more = {"silent": silent, "crashed": crashed}


DRILL = Drill("R3 damage", ours, peer, (24, 60), (18, 45), slice=4)

if __name__ == "__main__":
    DRILL.main()
