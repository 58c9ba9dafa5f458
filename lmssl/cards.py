"""The README.md of a checkpoint: how it was made, what was measured, and how to use it in plain transformers."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import yaml

from lmssl import evidence
from lmssl.models import AUTO

USES = {
    "sentiment": """\
from transformers import pipeline
classify = pipeline("text-classification", model={folder})
print(classify({text}, truncation=True))""",
    "translation": """\
from transformers import {auto}, AutoTokenizer
model, tokenizer = {auto}.from_pretrained({folder}), AutoTokenizer.from_pretrained({folder})
inputs = tokenizer([{text}], return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**inputs){new}, skip_special_tokens=True))""",
    "qa": """\
from transformers import AutoModelForQuestionAnswering, AutoTokenizer
model, tokenizer = AutoModelForQuestionAnswering.from_pretrained({folder}), AutoTokenizer.from_pretrained({folder})
question, context = "Who wrote it?", "It was written by Ada Lovelace in 1843."
inputs = tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True, truncation="only_second")
spans, inside = inputs.pop("offset_mapping")[0], [i for i, s in enumerate(inputs.sequence_ids()) if s == 1]
outputs = model(**inputs)
scores = outputs.start_logits[0, inside, None] + outputs.end_logits[0, None, inside]
scores = scores.where(scores.new_ones(scores.shape).triu().tril({longest} - 1) > 0, float("-inf"))
start, end = (inside[i] for i in divmod(scores.argmax().item(), len(inside)))
answer = context[spans[start][0] : spans[end][1]].strip()
{null}print(answer)""",
}
"""Prediction without lmssl, by task."""


def _quoted(text: str) -> str:
    """As Python source, in double quotes.

    >>> print(_quoted('my "runs"'))
    "my \\"runs\\""
    """
    return json.dumps(text, ensure_ascii=False)


def _card(folder: str, tags: list[str], text: str) -> str:
    return f"---\nlibrary_name: transformers\ntags: [{', '.join(['lmssl', *tags])}]\n---\n# {Path(folder).name}\n\n{text}"


def _recipe(recipe: dict[str, Any]) -> str:
    return f"The recipe that made it (`recipe.yaml`):\n\n```yaml\n{yaml.safe_dump(recipe, sort_keys=False, width=100).rstrip()}\n```\n"


def model_card(metrics: dict[str, Any], recipe: dict[str, Any]) -> str:
    """The card of a pretrained backbone."""
    held, auto = metrics["held_out"], AUTO[metrics["family"]].__name__
    folder = recipe["trainer"]["output_dir"]
    return _card(
        folder,
        [metrics["objective"]],
        f"""A {metrics["architecture"]} {metrics["family"]} of {metrics["parameters"]:,} parameters, pretrained with lmssl by `{metrics["objective"]}`.

| measured | |
|---|---|
| held-out loss | {held["loss"]:.4f} nats a labelled token |
| bits per byte | {held["bits_per_byte"]:.4f} |
| tokens | {metrics["tokens"]:,} in {metrics["steps"]:,} steps |
| training time | {metrics["seconds"]:.0f} s, {metrics["tokens_per_second"]:,.0f} tokens/s |
| seed | {metrics["seed"]} |

```python
from transformers import {auto}, AutoTokenizer
model = {auto}.from_pretrained({_quoted(folder)})
tokenizer = AutoTokenizer.from_pretrained({_quoted(folder)})
```

{_recipe(recipe)}""",
    )


def task_card(metrics: dict[str, Any], recipe: dict[str, Any]) -> str:
    """The card of a fine-tuned model: what it reached beside its twin, and how to use it."""
    folder, task = recipe["trainer"]["output_dir"], metrics["task"]
    accepted = "".join(f"Accepted: {evidence.accepted_in_words(change)}.\n\n" for change in metrics.get("accepted", []))
    return _card(
        folder,
        [task],
        f"""`{metrics["backbone"]}` ({metrics["architecture"]}, {metrics["family"]}) fine-tuned for {task} on {metrics["saved_labels"]:,} labelled examples
(seed 0). {metrics["metric"]} in percent on {metrics["test_examples"]:,} test examples, beside the same model from scratch:

{evidence.label_table(metrics)}

{accepted}Leak check: {evidence.leaks_in_words(metrics["leaks"])}.

{use(metrics, recipe)}Files of inputs: `lmssl predict {shlex.quote(folder)} FILE`.

{_recipe(recipe)}""",
    )


def use(metrics: dict[str, Any], recipe: dict[str, Any]) -> str:
    """Prediction in plain transformers, a block of code; nothing for a task that is none of lmssl's own."""
    folder, task, decoder = recipe["trainer"]["output_dir"], metrics["task"], metrics["family"] == "decoder"
    if task == "qa" and metrics["written"]:
        task = "translation"
    if task not in USES:
        return ""
    auto = "AutoModelForCausalLM" if decoder else "AutoModelForSeq2SeqLM"
    text = '"A text to work on."'
    if task == "sentiment" and recipe["task"].get("text_b"):
        text = repr({"text": "The first text.", "text_pair": "The second." + recipe["task"]["cue"]})
    elif task == "sentiment":
        text = repr("A text to work on." + recipe["task"]["cue"])
    if task == "translation":
        separator = recipe["task"]["separator"]
        text = (
            repr("A text to work on." + (separator if decoder else ""))
            if metrics["task"] == "translation"
            else repr(f"The question?{separator}The text with the answer." + (separator if decoder else ""))
        )
    null = ""
    if recipe["task"].get("no_answer"):
        at = -1 if decoder else 0
        null = f"""null = outputs.start_logits[0, {at}] + outputs.end_logits[0, {at}]
answer = "" if null - scores.max() > {recipe["task"]["null_margin"]} else answer  # unanswerable
"""
    lines = USES[task].format(
        folder=_quoted(folder), text=text, auto=auto, new='[:, inputs["input_ids"].shape[1] :]' if decoder else "", longest=recipe["task"].get("longest"), null=null
    )
    return f"```python\n{lines}\n```\n\n"
