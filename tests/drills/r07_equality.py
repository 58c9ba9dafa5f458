"""R7: 1x32 = 2x16 = 4x8 = 8x4 = two ranks (micro-batches x size): the same loss and gradient within 1e-6, for every
family and head. The difference of gradients is taken over all parameters end to end, in float64."""

import json
import random
from pathlib import Path

from tests.drills import stock
from tests.drills.common import Drill, Tally, answer, ranks, tokens_of
from tests.helpers import SMALL, sentences

LAYOUTS = [(1, 32), (2, 16), (4, 8), (8, 4)]
FAMILIES = {"decoder": "llama", "encoder": "bert", "encoder-decoder": "t5"}
HEADS = [*SMALL, *(f"{task} {family}" for task in ("sentiment", "translation", "qa") for family in FAMILIES)]


def step(head: str, folder: Path, out: Path, accumulate: int, micro: int):
    """Loss and gradient (a path to it) of the first step."""
    import torch

    import lmssl
    from lmssl.data import corpus
    from lmssl.data.stream import mix
    from lmssl.tasks import make_task
    from lmssl.tasks.base import Backbone, Few
    from lmssl.trainer import ExactTrainer
    from tests import helpers

    tokens = tokens_of(folder)
    args = helpers.arguments(out, max_steps=1, per_device_train_batch_size=micro, gradient_accumulation_steps=accumulate, max_grad_norm=0.0)
    if head in SMALL:
        made = lmssl.PretrainTrainer(helpers.small_model(head, tokens.vocab()), helpers.OBJECTIVE[head], tokens, args, 32, quiet=True)
    else:
        name, family = head.split()
        task, source = make_task({"name": name, "labels": [40], **({"max_new_tokens": 8} if name == "translation" else {})}), folder / family
        backbone = Backbone.load(str(source), 32, ["0", "1"] if name == "sentiment" else [])
        examples = task.read(corpus.resolve(str(folder / f"{name}.jsonl"), "data.train"))
        items = [item for some in task.encode(backbone, examples) for item in some]
        made = ExactTrainer(task.model(backbone, True, 0), args, Few(items, [""] * len(items), mix(0), 32), task.collator(backbone, 8), quiet=True)
    for module in made.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    loss, grad = helpers.first_step(made)
    if made.args.process_index == 0:
        torch.save(grad, out.with_suffix(".pt"))
    return loss


def backbones(folder: Path) -> None:
    from tests import helpers

    tokens = tokens_of(folder)
    for family, architecture in FAMILIES.items():
        helpers.saved_backbone(architecture, tokens, folder / family)
    rows = {"sentiment": [], "translation": [], "qa": []}
    for n, text in enumerate(sentences(40)):
        words = text.split()
        rows["sentiment"].append({"text": text, "label": str(n % 2)})
        rows["translation"].append({"source": text, "target": " ".join(words[: 1 + n % 7])})
        rows["qa"].append({"id": str(n), "context": text, "question": words[0], "answers": {"text": [words[-1]], "answer_start": [text.rindex(words[-1])]}})
    for name, some in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))


def apart(a: Path, b: Path) -> float:
    import torch

    from tests import helpers

    return helpers.apart(torch.load(a.with_suffix(".pt"), weights_only=True), torch.load(b.with_suffix(".pt"), weights_only=True))


def compare(tally: Tally, heads: list[str], step, folder: Path, two_ranks: bool) -> None:
    worst = 0.0
    for head in heads:
        name = head.replace(" ", "-")
        layouts = [(f"{g}x{b}", 1, g, b) for g, b in LAYOUTS] + ([("two ranks", 2, 2, 8)] if two_ranks else [])
        results = []
        for label, world, accumulate, micro in layouts:
            out = folder / f"{name}-{label.replace(' ', '-')}"
            try:
                results.append((label, ranks(world, lambda h=head, o=out, g=accumulate, b=micro: step(h, folder, o, g, b), folder)[0], out))
            except RuntimeError as error:
                tally(False, f"{head} {label}: {str(error)[-200:]}")
        if not results:
            continue
        _, loss, first = results[0]
        for label, other, out in results[1:]:
            differences = abs(other - loss) / abs(loss), answer(lambda a=out, b=first: apart(a, b), folder)
            worst = max(worst, *differences)
            tally(max(differences) < 1e-6, f"{head} {label}: loss {differences[0]:.1e}, gradient {differences[1]:.1e}")
    tally.more = {"heads": len(heads), "largest_difference": float(f"{worst:.2g}")}


def ours(tally: Tally, count: int, draw: random.Random, folder: Path) -> None:
    tokens_of(folder)
    answer(lambda: backbones(folder), folder)
    compare(tally, HEADS[:count], step, folder, True)


def peer(tally: Tally, count: int, draw: random.Random, folder: Path) -> None:
    def one(head: str, folder: Path, out: Path, accumulate: int, micro: int):
        import torch
        import transformers

        from tests import helpers

        name, _, head_class = head.partition(" ")
        auto = getattr(transformers, head_class or {"gpt2": "AutoModelForCausalLM", "llama": "AutoModelForCausalLM"}.get(name, "AutoModelForMaskedLM"))
        found, tokenizer = stock.rows(folder)
        draw = random.Random(1)
        rows = []
        for row in list(found)[:32]:
            ids = row["input_ids"]
            labels = [i if draw.random() < 0.2 + 0.6 * (len(rows) % 2) else -100 for i in ids]
            extra = {"labels": len(rows) % 2} if "Sequence" in auto.__name__ else {"start_positions": 3, "end_positions": 5} if "Question" in auto.__name__ else {"labels": labels}
            rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), **extra})
        special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "decoder_start_token_id": tokenizer.pad_token_id}
        transformers.set_seed(0)
        keys = SMALL[name] | (helpers.DROPOUT.get(name) or {}) | special
        keys |= {"cls_token_id": None, "sep_token_id": None} if name == "modernbert" else {}
        model = auto.from_config(transformers.AutoConfig.for_model(name, vocab_size=len(tokenizer), **keys))
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        args = helpers.arguments(out, max_steps=1, per_device_train_batch_size=micro, gradient_accumulation_steps=accumulate, max_grad_norm=0.0, disable_tqdm=True)
        args.train_sampling_strategy = "sequential"
        trainer = transformers.Trainer(model, args, transformers.default_data_collator, rows)
        grads = helpers.Grads()
        trainer.add_callback(grads)
        trainer.train()
        torch.save(grads.value, out.with_suffix(".pt"))
        return trainer.state.log_history[0]["loss"]

    heads = [
        "gpt2", "llama", "bert", "roberta", "modernbert", "t5 AutoModelForSeq2SeqLM", "bart AutoModelForSeq2SeqLM",
        "bert AutoModelForSequenceClassification", "roberta AutoModelForSequenceClassification", "gpt2 AutoModelForSequenceClassification",
        "bert AutoModelForQuestionAnswering", "roberta AutoModelForQuestionAnswering",
    ]  # fmt: skip
    compare(tally, heads[:count], one, folder, False)


DRILL = Drill("R7 equality", ours, peer, (16, 16), (12, 12), slice=1)

if __name__ == "__main__":
    DRILL.main()
