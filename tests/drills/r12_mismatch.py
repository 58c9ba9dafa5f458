"""R12: tokenizer, model, data, labels, objective or run that do not belong together are refused before step 0, and the
line names both sides."""

import json
import random
import re
from pathlib import Path

from tests.drills import stock
from tests.drills.common import ROOT, Child, Drill, Tally, answer, command, lmssl, recipe, tokens_of
from tests.drills.r07_equality import backbones

BPE = ROOT / "tokenizer_assets" / "bpe-8k"


def tuning(folder: Path, task: str, family: str, out: Path, **more) -> Path:
    """A fine-tuning recipe; `more` replaces keys by `section__key`."""
    sections = {
        "task": {"name": task, "labels": [8], "seeds": 1},
        "data": {"train": str(folder / f"{task}.jsonl"), "test": 4, "max_length": 32},
        "model": {"from": str(folder / family)},
        "trainer": {"output_dir": str(out), "max_steps": 1, "bf16": False},
    }
    for name, value in more.items():
        section, key = name.split("__")
        sections[section][key] = value
    path = folder / f"{out.name}.yaml"
    path.write_text(json.dumps(sections))
    return path


def prepared(folder: Path) -> None:
    """Backbones, a run to resume, labelled files that do not fit."""
    from lmssl import tokenization

    backbones(folder)
    for kind in ("bpe", "wordpiece"):
        from tests import helpers

        helpers.tokenizer(kind).save(folder / f"tok-{kind}")
    bare = tokenization.load(folder / "tok-bpe")
    bare.roles.pop("mask")
    bare.sentinels.clear()
    bare.save(folder / "tok-bare")
    (folder / "one-class.jsonl").write_text("".join(json.dumps({"text": f"film {n}", "label": "good"}) + "\n" for n in range(20)))
    (folder / "other-class.jsonl").write_text(json.dumps({"text": "a film", "label": "7"}) + "\n")
    for name, starts in (("offset", [2] + [1] * 19), ("outside", [99] * 20)):
        rows = [{"id": str(n), "context": "a film", "question": "what", "answers": {"text": ["film"], "answer_start": [start]}} for n, start in enumerate(starts)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def cases(folder: Path) -> dict[str, tuple]:
    """name -> (work in a child, what the line must say)."""
    run = folder / "run"
    made = recipe(folder, "masked", run, max_steps=4, save_steps=2)

    def again(*words):
        return command("pretrain", made, "--resume", "trainer.max_steps=8", *words)

    def first(kind="masked", *words):
        return command("pretrain", recipe(folder, kind, folder / f"new-{kind}", max_steps=1), "--overwrite", *words)

    def tune(task, family, **more):
        Child.number += 1
        return command("finetune", tuning(folder, task, family, folder / f"tuned-{Child.number}", **more), "--overwrite")

    def api(work):
        def inner():
            from lmssl.errors import UserError

            try:
                work()
            except UserError as error:
                print(f"lmssl: error: {error}")
                return 2
            return 0

        return inner

    def smaller_model():
        from lmssl import PretrainTrainer, TokenSet
        from tests import helpers

        tokens = TokenSet(folder / "tokens-300")
        model = helpers.small_model("bert", tokens.vocab())
        model.resize_token_embeddings(400)
        PretrainTrainer(model, helpers.OBJECTIVE["bert"], tokens, helpers.arguments(folder / "x"), 32, quiet=True)

    def nothing_asked():
        from tests import helpers
        from tests.drills.common import trainer

        made = trainer("bert", tokens_of(folder), folder / "asked", max_steps=2)
        collate = made.data_collator
        made.data_collator = lambda rows: (b := collate(rows)) | {"labels": b["labels"] * 0 - 100}
        assert helpers
        made.run()

    def without_held_out():
        import lmssl
        from tests import helpers

        tokens = lmssl.from_iterable(["a film", "a story", "music"] * 3, helpers.tokenizer(), folder / "none-held", 0.0)
        lmssl.PretrainTrainer(helpers.small_model("gpt2", tokens.vocab()), helpers.OBJECTIVE["gpt2"], tokens, helpers.arguments(folder / "x"), 32, quiet=True)

    return {
        "vocabulary against tokenizer": (first("masked", "model.vocab_size=777"), r"777.*8192"),
        "token set against model": (api(smaller_model), r"420 ids.*400"),
        "positions against rows": (first("masked", "model.max_position_embeddings=16"), r"16 positions.*32"),
        "checkpoint positions against rows": (command("pretrain", from_checkpoint(folder), "--overwrite"), r"64 positions.*has 32|need 64.*32"),
        "objective against family": (first("masked", "objective.name=next_token"), r"next_token.*bert.*encoder"),
        "decoder for masks": (first("next_token", "objective.name=masked"), r"masked.*gpt2.*decoder"),
        "tokenizer without a mask": (first("masked", f"data.tokenizer={folder / 'tok-bare'}"), r"tok-bare.*mask|mask.*tok-bare|mask"),
        "heads against width": (first("masked", "model.num_attention_heads=5"), r"32.*5|5.*32"),
        "resume, other seed": (again("trainer.seed=9"), r"seed changed: checkpoint-4 has 0, this run 9"),
        "resume, other batch": (again("trainer.per_device_train_batch_size=2"), r"batch changed: checkpoint-4 has 4, this run 2"),
        "resume, other length": (again("data.seq_length=16"), r"seq_length changed: checkpoint-4 has 32, this run 16"),
        "resume, other data": (again(f"data.text={folder / 'little.txt'}"), r"\w+ changed: checkpoint-4 has .*, this run "),
        "resume, other tokenizer": (again(f"data.tokenizer={folder / 'tok-bpe'}"), r"\w+ changed: checkpoint-4 has .*, this run "),
        "resume, other objective": (again("objective.rate=0.4"), r"objective changed: checkpoint-4 has .*, this run "),
        "resume, other model": (again("model.num_hidden_layers=1"), r"model changed: checkpoint-4 has bert, .*, this run bert, "),
        "labels against examples": (tune("sentiment", "encoder", task__labels=[5000]), r"5000 labels asked for, \d+ examples"),
        "labels against classes": (tune("sentiment", "encoder", task__labels=[1]), r"1 labels cannot hold one example of each of 2"),
        "one class": (tune("sentiment", "encoder", data__train=str(folder / "one-class.jsonl")), r"only one class \(good\).*two"),
        "a class that training lacks": (tune("sentiment", "encoder", data__test=str(folder / "other-class.jsonl")), r"other-class.jsonl:1: the class '7'.*0, 1"),
        "answer beside its offset": (tune("qa", "encoder", data__train=str(folder / "offset.jsonl")), r"offset.jsonl:2"),
        "answer outside the context": (tune("qa", "encoder", data__train=str(folder / "outside.jsonl")), r"outside.jsonl:1.*99"),
        "inputs longer than positions": (tune("sentiment", "encoder", data__max_length=512), r"512 tokens.*32 positions"),
        "task column": (tune("translation", "decoder", task__source="sourc"), r"no column 'sourc'; did you mean 'source'"),
        "no backbone": (tune("sentiment", "nowhere"), r"nowhere"),
        "all labels -100": (api(nothing_asked), r"no label of \d+ steps asks anything.*-100"),
        "nothing held out": (api(without_held_out), r"held out"),
    }  # fmt: skip


def from_checkpoint(folder: Path) -> Path:
    path = folder / "continue.yaml"
    path.write_text(
        f"data: {{text: {folder / 'text.txt'}, seq_length: 64, held_out: 0.1}}\nmodel: {{from: {folder / 'encoder'}}}\nobjective: {{name: masked}}\n"
        f"trainer: {{output_dir: {folder / 'new'}, max_steps: 1, bf16: false}}\n"
    )
    return path


def ours(tally: Tally, count: int, draw: random.Random, folder: Path) -> None:
    tokens_of(folder)
    answer(lambda: prepared(folder), folder)
    lmssl(folder, "pretrain", recipe(folder, "masked", folder / "run", max_steps=4, save_steps=2))
    todo = list(cases(folder).items())
    for name, (work, message) in todo[:count]:
        child = Child(work, folder)
        code, text = child.wait(), child.text()
        errors = [line for line in text.splitlines() if line.startswith("lmssl: error")]
        held = code == 2 and len(errors) == 1 and bool(re.search(message, errors[0])) and "Traceback" not in text and "step 1/" not in text
        tally(held, f"{name}: exit {code}: {text[-300:]}")


def peer(tally: Tally, count: int, draw: random.Random, folder: Path) -> None:
    """Nine of the same on the stock Trainer; refused in words before step 0 is what counts."""

    def run(change):
        def work():
            made = stock.trainer(folder, "masked", folder / "out", max_steps=2, save_steps=1)
            change(made)
            made.train()

        return work

    def wrap(key, value):
        def change(made):
            collate = made.data_collator

            def spoilt(rows):
                batch = collate(rows)
                batch[key] = value(batch[key])
                return batch

            made.data_collator = spoilt

        return change

    def narrow(made):
        made.model.resize_token_embeddings(200)

    def short(made):
        import transformers

        config = made.model.config
        config.max_position_embeddings = 16
        made.model = transformers.AutoModelForMaskedLM.from_config(config)

    def resumed(**keys):
        def work():
            stock.trainer(folder, "masked", folder / "again", max_steps=2, save_steps=1).train()
            made = stock.trainer(folder, "masked", folder / "again", max_steps=4, save_steps=1, **keys)
            made.train(resume_from_checkpoint=True)

        return work

    todo = {
        "all labels -100": run(wrap("labels", lambda v: v * 0 - 100)),
        "label out of range": run(wrap("labels", lambda v: v * 0 + 99_999)),
        "id out of range": run(wrap("input_ids", lambda v: v * 0 + 99_999)),
        "model smaller than tokenizer": run(narrow),
        "positions against rows": run(short),
        "resume, other seed": resumed(seed=9),
        "resume, other batch": resumed(per_device_train_batch_size=2),
        "resume, other data": resumed(text="little.txt"),
        "resume, other accumulation": resumed(gradient_accumulation_steps=4),
    }
    for name, work in list(todo.items())[:count]:
        child = Child(work, folder)
        code = child.wait()
        text = child.text()
        refused = code != 0 and "'loss'" not in text and "ValueError" in text
        tally(refused, f"{name}: exit {code}: {text.strip().splitlines()[-1][:120] if text.strip() else ''}")


DRILL = Drill("R12 mismatch", ours, peer, (26, 26), (9, 9), slice=6)

if __name__ == "__main__":
    DRILL.main()
