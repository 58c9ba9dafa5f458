"""R11: mutated recipes, each through the command line: no traceback, nothing accepted that then crashes, and the right
suggestion for a typo of one edit."""

import copy
import json
import random
import re
from pathlib import Path
from typing import Any

from tests.drills import stock
from tests.drills.common import ROOT, Child, Drill, Tally, answer, command
from tests.helpers import sentences

POOL = [
    -1, 0, 1, 3, 7, 1.5, -0.5, 1e-12, 1e12, 10**9, 2**63, float("nan"), float("inf"), True, False, None, "", " ", "x", "-1", "1e-3", "no", "../x", "ünï", "a" * 300,
    [], [1, 2], ["a"], [None], {}, {"a": 1}, {"a": {"b": [1]}}, "${HOME}", "!!python/object", "0x10", "2020-01-01", "masked", "gpt2",
]  # fmt: skip
LETTERS = "abcdefghijklmnopqrstuvwxyz_"
SECONDS = 12.0


def bases(folder: Path) -> list[tuple[str, dict[str, dict[str, Any]]]]:
    """(verb, recipe) of runs that take a second."""
    trainer = {
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 64,
        "learning_rate": 1e-3,
        "bf16": False,
        "save_strategy": "no",
        "weight_decay": 0.1,
        "warmup_steps": 1,
    }
    trainer |= {
        "lr_scheduler_type": "cosine",
        "gradient_accumulation_steps": 1,
        "logging_steps": 1,
        "optimizer": "muon",
        "seed": 0,
        "dataloader_num_workers": 0,
        "max_grad_norm": 1.0,
    }
    tokenizer, text = str(ROOT / "tokenizer_assets" / "bpe-8k"), str(folder / "little.txt")
    found = []
    for name, architecture, keys, more in (
        ("next_token", "gpt2", {"n_embd": 16, "n_layer": 1, "n_head": 2}, {}),
        ("masked", "bert", {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}, {"rate": 0.3, "unit": "word", "mask": 0.8}),
        ("span_corruption", "t5", {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}, {"rate": 0.15, "mean_span": 3.0}),
        (
            "infilling",
            "bart",
            {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32},
            {},
        ),
    ):
        data = {"text": text, "tokenizer": tokenizer, "seq_length": 32, "held_out": 0.1, "on_bad_record": "stop", "decontaminate": False}
        found.append(("pretrain", {"data": data, "model": {"architecture": architecture, **keys}, "objective": {"name": name, **more}, "trainer": trainer}))
    tuning = {k: v for k, v in trainer.items() if k not in ("seed", "optimizer", "logging_steps")}
    task = {"labels": [8], "seeds": 1, "learning_rates": [], "validation": 0.25, "method": "full", "scratch_labels": []}
    for name, columns, family in (
        ("sentiment", {"text": "text", "label": "label"}, "encoder"),
        ("translation", {"source": "source", "target": "target", "max_new_tokens": 4}, "decoder"),
        ("qa", {"n_best": 2}, "encoder"),
    ):
        data = {"train": str(folder / f"{name}.jsonl"), "test": 4, "max_length": 32}
        found.append(("finetune", {"task": {"name": name, **columns, **task}, "data": data, "model": {"from": str(folder / family)}, "trainer": tuning}))
    return found


def edited(word: str, draw: random.Random) -> str:
    """One insertion, deletion, substitution or transposition."""
    at = draw.randrange(len(word))
    other = {
        "insert": word[:at] + draw.choice(LETTERS) + word[at:],
        "delete": word[:at] + word[at + 1 :],
        "substitute": word[:at] + draw.choice(LETTERS) + word[at + 1 :],
        "swap": word[:at] + word[at : at + 2][::-1] + word[at + 2 :],
    }[draw.choice(["insert", "delete", "substitute", "swap"])]
    return other if other and other != word else edited(word, draw)


def mutated(recipe: dict, draw: random.Random) -> tuple[str, str | None, str]:
    """(YAML text, the name that a suggestion must say, what was done)."""
    recipe, kind = copy.deepcopy(recipe), draw.choice(["key", "key", "name", "value", "value", "value", "value", "drop", "section", "text", "two"])
    section = draw.choice(list(recipe))
    keys = [k for k in recipe[section] if len(k) > 4]
    right, done = None, ""
    if kind == "key" and keys:
        key = draw.choice(keys)
        wrong = edited(key, draw)
        if wrong not in recipe[section]:
            recipe[section] = {wrong if k == key else k: v for k, v in recipe[section].items()}
            right, done = key, f"{section}.{wrong} for {key}"
    elif kind == "name":
        places = [("model", "architecture"), ("objective", "name"), ("task", "name"), ("trainer", "lr_scheduler_type"), ("trainer", "optimizer")]
        s, k = draw.choice([(s, k) for s, k in places if k in recipe.get(s, {})])
        word = recipe[s][k]
        recipe[s][k] = edited(word, draw)
        right, done = (word if len(word) > 3 else None), f"{s}.{k}: {recipe[s][k]} for {word}"
    elif kind == "drop":
        key = draw.choice(list(recipe[section]) or [""])
        recipe[section].pop(key, None)
        done = f"without {section}.{key}"
    elif kind == "section":
        wrong = edited(section, draw)
        recipe = {wrong if k == section else k: v for k, v in recipe.items()}
        right, done = section, f"section {wrong} for {section}"
    else:
        for _ in range(2 if kind == "two" else 1):
            section = draw.choice(list(recipe))
            key, value = draw.choice(list(recipe[section]) or ["x"]), draw.choice(POOL)
            recipe[section][key] = value
            done += f"{section}.{key}: {str(value)[:40]!r} "
    import yaml

    text = yaml.safe_dump(recipe, allow_unicode=True)
    if kind == "text":
        at, junk = draw.randrange(len(text)), draw.choice(["\t", "{", "]", ":", "&a *a", "\x07", "- ", "!!x ", "|\n", "\u2028", "'", "#", "%", "\n"])
        text, done = text[:at] + junk + text[at + draw.choice([0, 1]) :], f"{junk!r} at {at}"
    return text, right, done


def write_data(folder: Path) -> None:
    from tests import helpers
    from tests.drills.r07_equality import backbones

    backbones(folder)
    tokens = helpers.token_set(folder)
    helpers.small_model("gpt2", tokens.vocab()).save_pretrained(folder / "decoder")
    for name in ("sentiment", "translation", "qa"):
        lines = (folder / f"{name}.jsonl").read_text().splitlines()[:24]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def limits() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, 12 * 2**30))


def ours(tally: Tally, count: int, draw: random.Random, folder: Path) -> None:
    (folder / "little.txt").write_text("\n".join(sentences(60)))
    answer(lambda: write_data(folder), folder)
    typos = suggested = accepted = endless = 0
    all_bases = bases(folder)
    for verb, recipe in all_bases:
        # The bases themselves must run, or nothing below means anything.
        path = folder / "base.yaml"
        recipe["trainer"]["output_dir"] = str(folder / "base")
        path.write_text(json.dumps(recipe))
        child = Child(command(verb, path, "--overwrite"), folder)
        assert child.wait() == 0, child.text()[-2000:]
    for number in range(count):
        verb, recipe = draw.choice(all_bases)
        recipe["trainer"]["output_dir"] = str(folder / f"run-{number}")
        text, right, done = mutated(recipe, draw)
        path = folder / f"{number}.yaml"
        path.write_text(text, encoding="utf-8", errors="surrogatepass")

        def run(path=path, verb=verb):
            import os

            limits()
            os.chdir(folder)
            return command(verb, path)()

        child = Child(run, folder)
        code = child.wait(SECONDS)
        output = child.text()
        errors = [line for line in output.splitlines() if line.startswith("lmssl: error")]
        accepted += code == 0
        # -9: it was still training when the drill's time was up.
        endless += code == -9
        calm = "Traceback" not in output and ((code == 2 and len(errors) == 1) or code in (0, -9) or (code == 3 and len(errors) == 1))
        if right:
            tally(code != 0, f"{verb} {done}: accepted")
        if right and code == 2:
            typos += 1
            suggested += f"'{right}'" in errors[0] or re.search(rf"\b{re.escape(right)}\b", errors[0].partition(";")[2] or errors[0]) is not None
        tally(calm, f"{verb} {done}: exit {code}: {output[-250:]}")
    tally.more = {"accepted_and_ran": accepted, "still_running": endless, "typos": typos, "suggested": suggested}
    if typos >= 20:
        tally(suggested >= 0.95 * typos, f"only {suggested} of {typos} typos met the right suggestion")


def peer(tally: Tally, count: int, draw: random.Random, folder: Path) -> None:
    """Senseless values and misspelt keys handed to HfArgumentParser, TrainingArguments and the configuration."""
    (folder / "little.txt").write_text("\n".join(sentences(60)))
    base = next(recipe for verb, recipe in bases(folder) if verb == "pretrain")["trainer"]
    wrong = [(k, v) for k in base for v in POOL if k not in ("save_strategy", "logging_steps", "optimizer", "bf16", "seed") and senseless(v)]
    for key, value in draw.sample(wrong, min(count, len(wrong))):

        def run(key=key, value=value):
            import transformers

            keys = {k: v for k, v in base.items() if k not in ("optimizer", "bf16")} | {key: value, "output_dir": str(folder / "out")}
            args = transformers.HfArgumentParser(transformers.TrainingArguments).parse_dict(keys)[0]
            made = stock.trainer(folder, "next_token", folder / "out", max_steps=1)
            made.args = args
            args.use_cpu, args.disable_tqdm = True, True
            print("accepted", flush=True)
            made.train()

        child = Child(run, folder)
        code = child.wait(10)
        refused = "accepted" not in child.text() and key in child.text()
        tally(refused, f"{key}: {str(value)[:30]!r}: {'accepted' if 'accepted' in child.text() else 'refused without its name'}, exit {code}")


def senseless(value: Any) -> bool:
    return isinstance(value, list | dict) or value in ("", " ", "x", -1, -0.5) or value is None or value != value


DRILL = Drill("R11 config fuzz", ours, peer, (60, 500), (20, 60), slice=6)

if __name__ == "__main__":
    DRILL.main()
