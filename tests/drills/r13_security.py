"""R13: pickles, remote code, YAML tags, archives and crooked paths: no code of theirs runs, no file outside the target
is written."""

import gzip
import io
import json
import os
import pickle
import random
import shutil
import tarfile
import zipfile
from pathlib import Path

from tests.drills.common import Child, Drill, Tally, answer, command, fresh, lmssl, recipe, tokens_of
from tests.drills.r07_equality import backbones
from tests.drills.r12_mismatch import tuning


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def torch_pickle(path: Path, mark: Path, keep: bool = True) -> None:
    """A torch file with an object in it that makes `mark` when it is loaded."""
    import torch

    old = torch.load(path, weights_only=False) if keep and path.exists() else {}
    torch.save({**old, "evil": Evil(mark)} if isinstance(old, dict) else [old, Evil(mark)], path)


def poisoned(folder: Path, source: Path, name: str, mark: Path) -> Path:
    """A copy of a backbone with something in it that runs where it is trusted."""
    out = fresh(folder / name)
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text())
    if name == "only a pickle":
        (out / "model.safetensors").unlink()
        torch_pickle(out / "pytorch_model.bin", mark, keep=False)
    elif name == "a pickle beside":
        torch_pickle(out / "pytorch_model.bin", mark, keep=False)
        torch_pickle(out / "training_args.bin", mark, keep=False)
    elif name == "model code":
        config["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModelForMaskedLM"), "evil.Evil")
        config["model_type"] = "evil"
    elif name == "model code, known type":
        config["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForSequenceClassification", "AutoModelForMaskedLM"), "evil.Evil")
    elif name == "tokenizer code":
        (out / "tokenizer.json").unlink()
        (out / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}))
    elif name == "tokenizer code beside":
        settings = json.loads((out / "tokenizer_config.json").read_text())
        (out / "tokenizer_config.json").write_text(json.dumps(settings | {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}))
    elif name == "a header that lies":
        (out / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    elif name == "a template that runs":
        (out / "chat_template.jinja").write_text(f"{{{{ cycler.__init__.__globals__.os.mkdir('{mark}') }}}}")
    elif name == "a recipe that names code":
        (out / "recipe.yaml").write_text(f"data: {{seq_length: 32}}\nobjective: {{name: '{name}.evil:Evil'}}\n")
    (out / "config.json").write_text(json.dumps(config))
    (out / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Evil: pass\n")
    return out


BACKBONES = ["only a pickle", "a pickle beside", "model code", "model code, known type", "tokenizer code", "tokenizer code beside", "a header that lies", "a template that runs"]
BACKBONES += ["a recipe that names code"]
HARMLESS = {"a pickle beside", "model code, known type", "tokenizer code beside", "a template that runs", "a recipe that names code"}
"""What is there to be ignored: the run goes on."""


def recipes(mark: Path) -> dict[str, str]:
    call = f"['{mark}']"
    return {
        "tag apply": f"data: !!python/object/apply:os.mkdir {call}\n",
        "tag new": f"data: !!python/object/new:os.mkdir {call}\n",
        "tag name": "data: {text: !!python/name:os.system ''}\n",
        "tag module": "data: {text: !!python/module:os ''}\n",
        "tag of its own": f"data: !os.mkdir {call}\n",
        "laughs": "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(9)),
        "alias to itself": "data: &a {text: *a}\n",
        "trust by file": "trainer: {trust_remote_code: true}\nmodel: {from: x, trust_remote_code: true}\ndata: {text: x}\nobjective: {name: masked}\n",
        "a pickle": "",
    }


def files(folder: Path, mark: Path) -> dict[str, bytes]:
    """Text files that are something else."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w:gz") as archive:
        info = tarfile.TarInfo(f"../../../../{mark}")
        info.size = 1
        archive.addfile(info, io.BytesIO(b"x"))
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr(f"../../../../{mark}", "x")
    return {
        "x.txt.gz": gzip.compress(b"\n" * 2**26, 9),
        "x.tar.gz": tar.getvalue(),
        "x.zip": zipped.getvalue(),
        "zip.jsonl": zipped.getvalue(),
        "pickle.jsonl": pickle.dumps(Evil(mark)),
        "pickle.parquet": pickle.dumps(Evil(mark)),
    }


def ours(tally: Tally, count: int, draw: random.Random, folder: Path) -> None:
    tokens_of(folder)
    answer(lambda: backbones(folder), folder)
    marks, few = folder / "marks", count < 20
    marks.mkdir()

    def outside() -> set[str]:
        skip = ("child-", "answer-", "cache", "marks", "tuned", "run", "hf")
        return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.name != "metrics.json" and not p.relative_to(folder).parts[0].startswith(skip)}

    def attempt(name: str, work, refused: bool | None) -> None:
        mark, before = marks / name.replace(" ", "-"), outside()
        child = Child(work(mark), folder)
        code, text = child.wait(), child.text()
        new = outside() - before
        calm = "Traceback" not in text and (refused is None or (code == 2) == refused)
        ran = sorted(p.name for p in marks.iterdir())
        tally(calm and not ran and not new, f"{name}: exit {code}, code ran {ran}, new files {sorted(new)[:3]}: {text[-300:]}")

    for name in draw.sample(BACKBONES, 1) if few else BACKBONES:
        answer(lambda name=name: str(poisoned(folder, folder / "encoder", name, marks / name.replace(" ", "-"))), folder)
        shutil.rmtree(marks)
        marks.mkdir()
        tune = tuning(folder, "sentiment", name, folder / "tuned")
        attempt(f"{name} fine", lambda mark, tune=tune: command("finetune", tune, "--overwrite"), name not in HARMLESS)
        path = folder / "run-pre.yaml"
        path.write_text(
            f"data: {{text: {folder / 'text.txt'}, seq_length: 32, held_out: 0.1}}\nmodel: {{from: {json.dumps(str(folder / name))}}}\nobjective: {{name: masked}}\n"
            f"trainer: {{output_dir: {folder / 'run-pre'}, max_steps: 1, bf16: false}}\n"
        )
        attempt(f"{name} pre", lambda mark, path=path: command("pretrain", path, "--overwrite"), name not in HARMLESS)
        attempt(f"{name} evaluate", lambda mark, name=name: os.chdir(folder) or command("evaluate", name, f"data.text={folder / 'text.txt'}"), None)
    for name, text in list(recipes(marks / "recipe").items())[: 3 if few else None]:
        path = folder / "run-recipe.yaml"
        path.write_bytes(pickle.dumps(Evil(marks / "recipe")) if name == "a pickle" else text.encode())
        attempt("recipe", lambda mark, path=path: command("pretrain", path), True)
    for name, content in list(files(folder, marks / "file").items())[: 1 if few else None]:
        text = folder / f"run-{name}"
        text.write_bytes(content)
        attempt("file", lambda mark, text=text: command("pretrain", recipe(folder, "masked", folder / "run-f"), f"data.text={text}", "--overwrite"), True)
    # A checkpoint to resume: with the manifest of before, and with one that agrees.
    path = recipe(folder, "masked", folder / "run-whole", max_steps=4, save_steps=2)
    lmssl(folder, "pretrain", path)
    for name in ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"][: 1 if few else None]:
        for sealed in (True,) if few else (False, True):
            out = fresh(folder / "run-whole-2")
            shutil.copytree(folder / "run-whole", out)
            (out / "metrics.json").unlink()
            shutil.rmtree(out / "checkpoint-2")
            mark = marks / f"resume-{name}-{sealed}"
            answer(lambda out=out, name=name, sealed=sealed, mark=mark: poison(out / "checkpoint-4", name, sealed, mark), folder)
            again = recipe(folder, "masked", out, max_steps=6, save_steps=2)
            attempt(f"resume-{name}-{sealed}", lambda m, again=again: command("pretrain", again, "--resume"), None if name == "training_args.bin" else True)
    # A record whose id is a path.
    rows = [{"id": f"../../../{marks}/id", "context": "a film", "question": "what", "answers": {"text": ["film"], "answer_start": [2]}} for _ in range(20)]
    (folder / "run-qa.jsonl").write_text("".join(json.dumps(r | {"context": f"a film {n}"}) + "\n" for n, r in enumerate(rows)))
    attempt("id", lambda mark: command("finetune", tuning(folder, "qa", "encoder", folder / "tuned", data__train=str(folder / "run-qa.jsonl")), "--overwrite"), None)
    tally.more = {"code_ran": len(list(marks.iterdir()))}


def poison(folder: Path, name: str, sealed: bool, mark: Path) -> None:
    from tests.drills.r03_damage import seal

    torch_pickle(folder / name, mark)
    if sealed:
        seal(folder)


def peer(tally: Tally, count: int, draw: random.Random, folder: Path) -> None:
    """What stock loading does with the same folders; `.bin` weights are read, with weights_only."""
    tokens_of(folder)
    answer(lambda: backbones(folder), folder)
    marks = folder / "marks"
    marks.mkdir()
    for name in BACKBONES:
        mark = marks / name.replace(" ", "-")
        answer(lambda name=name, mark=mark: str(poisoned(folder, folder / "encoder", name, mark)), folder)
        shutil.rmtree(marks)
        marks.mkdir()

        def load(name=name):
            import transformers

            transformers.AutoTokenizer.from_pretrained(folder / name)
            transformers.AutoModelForMaskedLM.from_pretrained(folder / name)

        child = Child(load, folder)
        code = child.wait()
        tally(not mark.exists(), f"{name}: exit {code}, code ran {mark.exists()}: {child.text()[-160:]}")
    # A folder with .bin weights alone, and no harm in them.
    plain = fresh(folder / "plain")
    shutil.copytree(folder / "encoder", plain)

    def convert():
        import torch
        from safetensors.torch import load_file

        torch.save(load_file(plain / "model.safetensors"), plain / "pytorch_model.bin")
        (plain / "model.safetensors").unlink()

    answer(convert, folder)

    def load_plain():
        import transformers

        transformers.AutoModelForMaskedLM.from_pretrained(plain)

    tally(Child(load_plain, folder).wait() != 0, "weights in a pickle are accepted")


DRILL = Drill("R13 security", ours, peer, (99, 99), slice=1)

if __name__ == "__main__":
    DRILL.main()
