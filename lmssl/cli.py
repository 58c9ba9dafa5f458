"""The command line: each verb parses, calls one function and prints. Heavy imports wait until a verb needs them."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lmssl import __version__, output
from lmssl.errors import Interrupted, Stopped, UserError, written
from lmssl.ranks import first_process

EPILOG = """\
A recipe is a YAML file; any key can be overridden after it as section.key=value, for example trainer.max_steps=100.
Several processes: accelerate launch -m lmssl pretrain RECIPE, or torchrun --nproc-per-node 2 -m lmssl pretrain RECIPE.
Exit status: 0 success, 2 user error (one line says which), 3 stopped by lmssl (non-finite loss, full disk),
128 + signal after SIGINT or SIGTERM, saved."""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="lmssl", description="Self-supervised pretraining of text models, and proof that it pays.", epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--version", action="version", version=f"lmssl {__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Callable[[argparse.Namespace], None], text: str, first: str = "") -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        if first:
            sub.add_argument(first.lower(), metavar=first)
            sub.add_argument("overrides", nargs="*", default=[], metavar="FILE or task.key=value" if name == "predict" else "section.key=value")
        return sub

    def continued(sub: argparse.ArgumentParser, resume: str, keys: str) -> None:
        either = sub.add_mutually_exclusive_group()
        either.add_argument("--resume", action="store_true", help=resume)
        either.add_argument("--overwrite", action="store_true", help="begin anew in a folder that holds a run")
        sub.add_argument("--accept", action="append", default=[], metavar="KEY", help=f"resume although KEY ({keys}) changed")

    sub = verb("tokenizer", _tokenizer, "Train a tokenizer on text, or complete one that lacks mask or sentinels (--from).")
    sub.add_argument("text", nargs="*", help="files, globs, folders, package:// files, each with an optional ::column")
    sub.add_argument("--out", required=True, help="folder to write")
    sub.add_argument("--kind", help="bpe (byte-level), wordpiece or unigram; default bpe")
    sub.add_argument("--size", type=int, help="number of ids, default 8192")
    sub.add_argument("--held-out", type=float, help="fraction of documents, by content hash, that training does not see")
    sub.add_argument("--skip-bad-records", action="store_true", help="leave out records that are no valid text, instead of stopping at the first")
    sub.add_argument("--from", dest="source", help="complete this tokenizer instead of training one")
    verb("prepare", _prepare, "Tokenize a recipe's text ahead of time.", "RECIPE")
    sub = verb("show", _show, "Print rows before and after the objective, in colour.", "RECIPE")
    sub.add_argument("--rows", type=_above_zero, help="how many, default 3, or all rows of the step")
    sub.add_argument("--at-step", type=_above_zero, metavar="N", help="the rows that optimizer step N reads (1, 2, ...), exactly as the run reads them")
    sub.add_argument("--at-item", type=int, metavar="N", help="the rows from item N of the stream on (0, 1, ...)")
    sub.add_argument("--batch", type=_above_zero, help="rows of a step over all processes, where a run had several")
    sub = verb("plan", _plan, "What some minutes of this machine buy: size, tokens, batch and steps, as a recipe.", "RECIPE")
    sub.add_argument("--minutes", type=float, required=True, help="training time to plan for")
    sub.add_argument("--out", help="file to write the recipe to instead of standard output")
    sub = verb("pretrain", _pretrain, "Pretrain a backbone on unlabelled text.", "RECIPE")
    sub.add_argument("--dry-run", action="store_true", help="run a few steps, print what the whole run will cost, leave nothing but the prepared text")
    continued(sub, "continue from the newest whole checkpoint", "seed, batch, data, ...")
    sub = verb("finetune", _finetune, "Fine-tune on few labels, beside the same model from scratch.", "RECIPE")
    sub.add_argument("--dry-run", action="store_true", help="run a few steps, print what the whole curve will cost, leave nothing")
    continued(sub, "keep the finished runs of the folder and go on with the others", "trainer.learning_rate, data.test, ...")
    sub = verb("predict", _predict, "Predictions of a fine-tuned checkpoint for files or, where none is named, standard input; one JSON object per line.", "CHECKPOINT")
    sub.add_argument("--task", help="sentiment, translation or qa; read from the checkpoint's recipe.yaml where there is one")
    sub.add_argument("--out", help="file to write instead of standard output")
    sub.add_argument("--batch", type=int, default=32, help="inputs at a time, default 32")
    sub = verb(
        "evaluate",
        _evaluate,
        "Held-out loss and bits per byte of a pretrained checkpoint (on other text: data.text=PATH); a fine-tuned one's scores (data.test=FILE).",
        "CHECKPOINT",
    )
    sub.add_argument("--pairs", metavar="FILE", help="minimal pairs instead (BLiMP format: sentence_good, sentence_bad, UID)")
    sub = verb("report", _report, "Write report.html for one run or a set of runs, into the first folder.")
    sub.add_argument("folders", nargs="+", metavar="FOLDER")
    sub.add_argument("--png", action="store_true", help="the plots as PNG files too")
    return top


def _above_zero(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


_above_zero.__name__ = "whole number above 0"


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit with its status."""
    sys.exit(run(argv))


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options, rest = parser().parse_known_args(argv)
    for item in rest:
        # Overrides may also stand behind options, where argparse does not expect them.
        if item.startswith("-") or not hasattr(options, "overrides") or ("=" not in item and options.verb != "predict"):
            parser().error(f"unrecognized argument: {item}")
        options.overrides.append(item)
    _quiet_libraries()
    _end_politely()
    for stream in (sys.stdout, sys.stderr):  # a terminal that has no letter for a text shows its number
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        options.run(options)
    except (UserError, Stopped, Interrupted) as error:
        _tell_launcher(error)
        if not isinstance(error, Stopped) and os.environ.get("LOCAL_RANK", "0") != "0":  # one line a machine: what is wrong may be wrong there alone
            return error.exit_code
        print(f"lmssl: error: {error}" if not isinstance(error, Interrupted) else f"lmssl: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as error:
        goes_on = ", --resume continues from it" if hasattr(options, "resume") else ""
        ended = Interrupted.by(error, f"stopped outside training steps; what was completed on disk is intact{goes_on}")
        print(f"lmssl: {ended}", file=sys.stderr)
        return ended.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except OSError as error:  # a name too long, a folder without permission, wherever it was first touched
        print(f"lmssl: error: {error.filename or 'file'}: {error.strerror or error}", file=sys.stderr)
        return Stopped.exit_code if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else UserError.exit_code
    return 0


def _tell_launcher(error: Exception) -> None:
    """For torchrun's own page: it shows what the first process that failed has written, which may be the only one that knows."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": {"message": f"lmssl: {error}", "extraInfo": {"timestamp": str(int(time.time()))}}}), encoding="utf-8")


def _quiet_libraries() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("lmssl").setLevel(logging.INFO if first_process() else logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _end_politely() -> None:
    """SIGTERM ends as SIGINT does, so that half-written folders are removed; while training, lmssl.watch has its own rule."""
    import signal
    import threading

    def end(signum: int, frame: object) -> None:
        raise KeyboardInterrupt("SIGTERM")

    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, end)


def _silence_transformers() -> None:
    import warnings

    import transformers

    transformers.utils.logging.disable_progress_bar()
    for text in (".*pin_memory.*", ".*lr_scheduler.step.*", ".*find_unused_parameters.*"):
        warnings.filterwarnings("ignore", message=text)


def _tokenizer(options: argparse.Namespace) -> None:
    from lmssl.data.tokens import below

    if bool(options.source) == bool(options.text):
        raise UserError("tokenizer: give text to train on, or --from FOLDER to complete an existing tokenizer")
    asked = {name: value for name in ("kind", "size") if (value := getattr(options, name)) is not None}
    given = [*asked, *(["held-out"] if options.held_out is not None else []), *(["skip-bad-records"] if options.skip_bad_records else [])]
    if options.source and given:
        raise UserError(f"--{given[0]}: is for training, and --from trains nothing; leave it out")
    held_out = options.held_out or 0.0
    if not 0 <= held_out < 1:
        raise UserError(f"--held-out: {held_out} must be a fraction of 0 or more, below 1")
    if (Path(options.out) / "tokenizer.json").exists():
        raise UserError(f"--out: {options.out} holds a tokenizer already")
    new = not Path(options.out).exists()
    with written(f"--out: {options.out}", UserError):  # before a long training
        Path(options.out).mkdir(parents=True, exist_ok=True)
    try:
        _make_tokenizer(options, asked, below(held_out))
    except BaseException:
        with contextlib.suppress(OSError):  # of a folder with something in it
            if new:
                Path(options.out).rmdir()
        raise


def _make_tokenizer(options: argparse.Namespace, asked: dict[str, Any], limit: int) -> None:
    """Into `--out`: a tokenizer trained as `asked` on the documents whose content hash is `limit` or more, or one completed."""
    from lmssl import tokenization
    from lmssl.data import corpus
    from lmssl.data.tokens import content_hash

    if options.source:
        tokenizer = tokenization.load(options.source)
        added = tokenizer.complete()
        print(f"added {len(added)} special tokens" + (f": {', '.join(added[:5])} ..." if added else ""))
    else:
        bad = corpus.BadRecords(options.skip_bad_records, "--skip-bad-records leaves such records out")
        texts = (text for text, _ in corpus.documents(corpus.resolve(options.text, "text"), None, bad) if content_hash(text) >= limit)
        tokenizer = tokenization.train(texts, progress=sys.stderr.isatty(), **asked)
        if bad.count:
            print(f"{bad.count:,} bad records skipped, the first: {bad.first[0]}")
    with written(f"the tokenizer in {options.out}"):
        tokenizer.save(options.out)
    print(f"{options.out}: {tokenizer.size} ids, sha256 {tokenizer.hash}")


def _prepare(options: argparse.Namespace) -> None:
    from lmssl.data import contamination
    from lmssl.objectives import make
    from lmssl.recipe import PretrainRecipe, prepared

    recipe = PretrainRecipe.load(options.recipe, options.overrides)
    tokenizer, objective = recipe.tokenizer(), make(recipe.objective)
    tokenizer.check(objective, recipe.objective["name"])
    found = prepared(recipe.data, tokenizer)
    for split in ("train", "held_out"):
        counts = found.manifest[split]
        print(f"{split:9} {counts['documents']:>10,} documents  {counts['tokens']:>13,} tokens  {counts['bytes']:>14,} bytes")
    if "decontaminated" in found.manifest:
        print(f"{found.manifest['decontaminated']:,} documents dropped that share {contamination.GRAM} words in a row with a test text")
        if short := found.manifest.get("tests_too_short"):
            print(f"{short:,} test texts have fewer than {contamination.SHORTEST} words and were not looked for")
    if skipped := found.manifest.get("bad_records", {}).get("skipped"):
        print(f"{skipped:,} bad records skipped, the first: {found.manifest['bad_records']['first'][0]}")
    print(f"{found.manifest['duplicates']:,} exact duplicates dropped; in {found.folder}")


def _show(options: argparse.Namespace) -> None:
    from lmssl import display, runs
    from lmssl.recipe import PretrainRecipe

    if options.at_item is not None and (options.at_item < 0 or options.at_step is not None):
        raise UserError(f"--at-item: {options.at_item} must be at least 0, and stand without --at-step")
    loaded = PretrainRecipe.load(options.recipe, options.overrides)
    stream, tokenizer, items = runs.preview(loaded, options.rows, options.at_step, options.batch, options.at_item)
    colour = display.wants_colour(sys.stdout)
    print(display.legend(colour))
    for i in items:
        print("\n" + display.row(stream, tokenizer, i, colour))


def _plan(options: argparse.Namespace) -> None:
    from lmssl import config, plan
    from lmssl.recipe import PretrainRecipe

    if not 0 < options.minutes <= 10**6:
        raise UserError(f"--minutes: {options.minutes:g} must be above 0 and at most {10**6:,}")
    out = _in_a_folder(options.out)
    if out and out.exists():
        raise UserError(f"--out: {out} is there already")
    loaded = PretrainRecipe.load(options.recipe, options.overrides)
    _silence_transformers()
    rungs, best, sections, cost = plan.plan(loaded, options.minutes)
    print("\n".join([plan.table(rungs, best), "", *cost.lines()]), file=sys.stderr)
    title = f"# {options.minutes:g} minutes, planned from {options.recipe}\n"
    if out:
        output.write(out, title + config.dump(sections))
    print(out or title + config.dump(sections, ascii=not output.has_all_letters()))


def _in_a_folder(out: str | None) -> Path | None:
    """The file of `--out`, refused where there is no folder for it."""
    if out and not Path(out).parent.is_dir():
        raise UserError(f"--out: no such folder: {Path(out).parent}")
    return Path(out) if out else None


def _print_cost(measure: str, loaded: Any) -> None:
    from lmssl import plan

    lines = getattr(plan, measure)(loaded).lines()
    if first_process():
        print("\n".join(lines))


def _check_accepted(options: argparse.Namespace) -> None:
    if options.accept and not options.resume:
        raise UserError(f"--accept {options.accept[0]}: means something with --resume alone; leave it out, or add --resume")


def _pretrain(options: argparse.Namespace) -> None:
    from lmssl import folders, runs
    from lmssl.recipe import PretrainRecipe

    loaded = PretrainRecipe.load(options.recipe, options.overrides)
    _check_accepted(options)
    _silence_transformers()
    if options.dry_run:
        _print_cost("cost", loaded)
        return
    folders.check_moved(options.recipe, Path(str(loaded.trainer.get("output_dir", ""))))
    metrics = runs.pretrain(loaded, resume=options.resume, overwrite=options.overwrite, accept=tuple(options.accept))
    if first_process():
        held = metrics["held_out"]
        print(f"held-out loss {held['loss']:.4f}, {held['bits_per_byte']:.4f} bits per byte; model in {loaded.trainer['output_dir']}")


def _finetune(options: argparse.Namespace) -> None:
    from lmssl import evidence, folders, runs
    from lmssl.recipe import FinetuneRecipe

    loaded = FinetuneRecipe.load(options.recipe, options.overrides)
    _check_accepted(options)
    _silence_transformers()
    if options.dry_run:
        _print_cost("curve_cost", loaded)
        return
    folders.check_moved(options.recipe, Path(str(loaded.trainer.get("output_dir", ""))))
    metrics = runs.finetune(loaded, resume=options.resume, overwrite=options.overwrite, accept=tuple(options.accept))
    if first_process():
        print(evidence.label_table(metrics))


def _predict(options: argparse.Namespace) -> None:
    from lmssl import predict

    _silence_transformers()
    overrides = [item for item in options.overrides if item.startswith("task.") and "=" in item]
    files = [item for item in options.overrides if item not in overrides]
    out = _in_a_folder(options.out)
    rows = predict.predict(options.checkpoint, files, task_name=options.task, overrides=overrides, batch=options.batch, quiet=not files)
    predict.write(rows, out)


def _evaluate(options: argparse.Namespace) -> None:
    from lmssl import scoring

    _silence_transformers()
    if options.pairs:
        if options.overrides:
            raise UserError(f"--pairs: '{options.overrides[0]}' would change nothing there; leave it out")
        found = scoring.minimal_pairs(options.checkpoint, options.pairs)
        right, mean = 100 * found["accuracy"], 100 * found["mean_by_phenomenon"]
        print(f"{right:.2f}% of {found['pairs']:,} minimal pairs right ({found['ties']} ties counted as half); mean of the phenomena {mean:.2f}%")
        return
    if scoring.is_fine_tuned(options.checkpoint):
        metric, scores = scoring.evaluate_task(options.checkpoint, options.overrides)
        shown = [metric, *(name for name, value in scores.items() if isinstance(value, float) and name != metric)]
        print(", ".join(f"{name} {100 * scores[name]:.2f}" for name in shown) + f" of 100 on {scores['test_examples']:,} examples")
        return
    found = scoring.evaluate(options.checkpoint, options.overrides)
    print(f"held-out loss {found['loss']:.6f}, {found['bits_per_byte']:.6f} bits per byte")


def _report(options: argparse.Namespace) -> None:
    from lmssl import report

    print(report.write([Path(f) for f in options.folders], png=options.png))
