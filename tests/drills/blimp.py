"""Minimal pairs beside lm-eval: the same log-likelihoods on the same checkpoint and pairs, or exit 1.

    python -m tests.drills.blimp CHECKPOINT PAIRS.jsonl.gz

lm-eval is not among the project's dependencies: `pip install lm-eval` first. It runs offline, from a task of a few
lines that is written beside the pairs. Prints one JSON line.
"""

import gzip
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import yaml

from lmssl import likelihood, models, tokenization

TASK = {
    "task": "pairs",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "train",
    "doc_to_text": "",
    "doc_to_target": 0,
    "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}],
}
LIMIT = 1e-4


def theirs(checkpoint: str, pairs: list[dict]) -> np.ndarray:
    """lm-eval's log-likelihoods, float64 [N, 2]."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "pairs.jsonl"
        data.write_text("".join(json.dumps({k: p[k] for k in ("sentence_good", "sentence_bad")}) + "\n" for p in pairs))
        (Path(folder) / "pairs.yaml").write_text(yaml.safe_dump(TASK | {"dataset_kwargs": {"data_files": str(data)}}))
        manager = TaskManager(include_path=folder, include_defaults=False)
        model = {"pretrained": checkpoint, "dtype": "float32", "device": "cpu"}
        found = simple_evaluate(model="hf", model_args=model, tasks=["pairs"], batch_size=64, task_manager=manager, log_samples=True, bootstrap_iters=0)
    samples = sorted(found["samples"]["pairs"], key=lambda s: s["doc_id"])
    return np.array([[float(answer[0]) for answer in s["filtered_resps"]] for s in samples])


def ours(checkpoint: str, pairs: list[dict]) -> np.ndarray:
    """lmssl's, float64 [N, 2]."""
    tokenizer, config = tokenization.load(checkpoint), models.read_config(checkpoint, "CHECKPOINT")
    begin = 1 if "bos" in tokenizer.roles else 0
    ids = [row[begin:-1] for row in tokenizer.encode([p[k] for p in pairs for k in ("sentence_good", "sentence_bad")])]
    model = models.AUTO[models.family_of(config)].from_pretrained(checkpoint, dtype=torch.float32)
    return likelihood.log_likelihoods(model, models.family_of(config), ids, tokenizer.vocab()).reshape(-1, 2)


def main(checkpoint: str, path: str) -> int:
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
        pairs = [json.loads(line) for line in file]
    a, b = ours(checkpoint, pairs), theirs(checkpoint, pairs)
    apart = np.abs(a - b)
    clear = np.abs(b[:, 0] - b[:, 1]) > LIMIT
    differ = int(((a[:, 0] > a[:, 1]) != (b[:, 0] > b[:, 1]))[clear].sum())
    held = bool(apart.max() < LIMIT and differ == 0)
    accuracy = likelihood.preferred(a[:, 0], a[:, 1], [p.get("UID", "all") for p in pairs])
    found = {"pairs": len(pairs), "largest_difference": float(apart.max()), "choices_that_differ": differ, "tied": int((~clear).sum()), "accuracy": accuracy["accuracy"]}
    print(json.dumps({"drill": "blimp", "held": held, **found}))
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
