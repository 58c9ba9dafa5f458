"""R6: a loss, gradient or weight that is not finite, or a spike, stops every rank before the update, names the step and
its rows, and nothing that is not finite is ever saved."""

import random
import re
from pathlib import Path

from tests.drills import stock
from tests.drills.common import Child, Drill, Tally, answer, ranks, tokens_of, trainer

KINDS = ["loss", "inf loss", "gradient", "weight", "spike", "one rank"]


def spoil(made, kind: str, step: int) -> None:
    """Make step `step` go wrong."""
    import torch

    original = made.training_step

    def training_step(model, inputs, *rest):
        now = made.state.global_step + 1
        if now == step and kind == "weight":
            with torch.no_grad():
                next(model.parameters()).view(-1)[0] = torch.nan
        value = original(model, inputs, *rest)
        if now != step:
            return value
        if kind in ("gradient", "spike"):
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.mul_(float("inf") if kind == "gradient" else 1e4)
        if kind == "inf loss":
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.add_(torch.inf)
        return value

    made.training_step = training_step
    if kind in ("loss", "inf loss", "one rank"):
        factor, loss = float("inf" if kind == "inf loss" else "nan"), made.compute_loss

        def compute_loss(*args, **kwargs):
            value = loss(*args, **kwargs)
            mine = kind != "one rank" or made.args.process_index == 1
            if made.state.global_step + 1 != step or not mine:
                return value
            return (value[0] * factor, *value[1:]) if isinstance(value, tuple) else value * factor

        made.compute_loss = compute_loss


def finite(root: Path) -> bool:
    import torch
    from safetensors.torch import load_file

    return all(torch.isfinite(v).all() for path in root.glob("**/*.safetensors") for v in load_file(path).values())


def ours(tally: Tally, count: int, draw: random.Random, folder: Path) -> None:
    tokens_of(folder)
    for number in range(count):
        kind, out = KINDS[number % len(KINDS)], folder / f"run-{number}"
        world = 2 if kind == "one rank" else 1
        step = draw.randint(18, 20) if kind == "spike" else draw.randint(2, 20)
        accumulate = draw.choice([1, 2])

        def drill(kind=kind, out=out, step=step, accumulate=accumulate):
            import torch

            from lmssl.errors import Diverged

            keys = {"max_steps": 22, "save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": accumulate, "on_spike": "stop"}
            made = trainer("bert", tokens_of(folder), out, **keys)
            spoil(made, kind, step)
            updates = []
            made.create_optimizer()
            apply = made.optimizer.step
            made.optimizer.step = lambda *a, **k: (updates.append(1), apply(*a, **k))[1]
            try:
                made.run()
            except Diverged as error:
                clean = all(torch.isfinite(p).all() for p in made.model.parameters()) or kind == "weight"
                return [str(error), made.state.global_step, clean and len(updates) == step - 1]
            return ["no error", made.state.global_step, False]

        batch = 4 * world * accumulate
        wanted = rf"step {step} \(items {(step - 1) * batch} to {step * batch - 1} of the stream\).*no update was made; its rows: lmssl show .* --at-step {step}"
        for text, reached, clean in ranks(world, drill, folder):
            named = bool(re.search(wanted, text))
            saved = answer(lambda out=out: finite(out), folder)
            tally(named and clean and reached == step - 1 and saved, f"{kind} at step {step}, {world} ranks: reached {reached}, clean {clean}, saved finite {saved}: {text[:200]}")


def peer(tally: Tally, count: int, draw: random.Random, folder: Path) -> None:
    for number in range(count):
        kind, out, step = ["loss", "gradient", "weight"][number % 3], folder / f"run-{number}", draw.randint(2, 19)

        def drill(kind=kind, out=out, step=step):
            made = stock.trainer(folder, "next_token", out, max_steps=20, save_steps=5)
            spoil(made, kind, step)
            made.train()
            made.save_model(str(out))

        child = Child(drill, folder)
        code = child.wait()
        saved = answer(lambda out=out: finite(out), folder)
        tally(code != 0 and saved, f"{kind} at step {step}: exit {code}, {'finite' if saved else 'not finite'} weights saved")


DRILL = Drill("R6 NaN, inf, spike", ours, peer, (6, 20), (3, 9), slice=2)

if __name__ == "__main__":
    DRILL.main()
