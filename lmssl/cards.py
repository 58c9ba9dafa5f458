"""The README.md of a checkpoint: how it was made, what was measured, and how to use it in plain transformers."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmssl import config, evidence
from lmssl.models import AUTO

if TYPE_CHECKING:
    from lmssl.tasks.base import Task


HEAD = "---\nlibrary_name: transformers\ntags: [lmssl"
"""What every card begins with, and nobody else's README."""


def _quoted(text: str) -> str:
    """As Python source, in double quotes.

    >>> print(_quoted('my "runs"'))
    "my \\"runs\\""
    """
    return json.dumps(text, ensure_ascii=False)


def _card(folder: str, tags: list[str], text: str) -> str:
    return f"{HEAD}{''.join(f', {tag}' for tag in tags)}]\n---\n# {Path(folder).name}\n\n{text}"


def _recipe(recipe: dict[str, Any]) -> str:
    return f"The recipe that made it (`recipe.yaml`):\n\n```yaml\n{config.dump(recipe).rstrip()}\n```\n"


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


def task_card(task: Task, metrics: dict[str, Any], recipe: dict[str, Any]) -> str:
    """The card of a fine-tuned model: what it reached beside its twin, and how to use it."""
    folder, usage = recipe["trainer"]["output_dir"], task.usage(_quoted(recipe["trainer"]["output_dir"]), metrics["family"] == "decoder", metrics["written"])
    block = f"```python\n{usage}\n```\n\n" if usage else ""
    accepted = "".join(f"Accepted: {evidence.accepted_in_words(change)}.\n\n" for change in metrics.get("accepted", []))
    return _card(
        folder,
        [task.name],
        f"""`{metrics["backbone"]}` ({metrics["architecture"]}, {metrics["family"]}) fine-tuned for {task.name} on {metrics["saved_labels"]:,} labelled examples
(seed 0). {metrics["metric"]} in percent on {metrics["test_examples"]:,} test examples, beside the same model from scratch:

{evidence.label_table(metrics)}

{accepted}Leak check: {evidence.leaks_in_words(metrics["leaks"])}.

{block}Files of inputs: `lmssl predict {shlex.quote(folder)} FILE`.

{_recipe(recipe)}""",
    )
