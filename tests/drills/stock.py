"""The stock twin of a run: transformers' Trainer and collators over group_texts rows, as its own examples do it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.drills.common import KINDS, ROOT


def rows(folder: Path, text: str = "text.txt", length: int = 32) -> Any:
    """Documents laid end to end and cut, the remainder dropped: run_clm's group_texts."""
    import datasets
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "tokenizer_assets" / "bpe-8k")
    ids = [i for line in (folder / text).read_text().splitlines() for i in tokenizer(line)["input_ids"]]
    cut = [ids[k : k + length] for k in range(0, len(ids) - length + 1, length)]
    return datasets.Dataset.from_dict({"input_ids": cut}), tokenizer


def trainer(folder: Path, kind: str, out: Path, *, data: Any = None, text: str = "text.txt", width: dict[str, int] | None = None, callbacks: Any = None, **keys: Any) -> Any:
    """A stock Trainer over a tiny model, dropout on; `kind` next_token or masked."""
    import transformers
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    from tests.helpers import SMALL

    name = KINDS[kind]
    found, tokenizer = rows(folder, text)
    transformers.set_seed(0)
    special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    config = transformers.AutoConfig.for_model(name, vocab_size=len(tokenizer), **(SMALL[name] | special | (width or {})))
    auto = transformers.AutoModelForCausalLM if kind == "next_token" else transformers.AutoModelForMaskedLM
    model = auto.from_config(config)
    values = {"max_steps": 40, "save_steps": 7, "per_device_train_batch_size": 4, "logging_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=kind == "masked")
    return Trainer(model, TrainingArguments(str(out), **(values | keys)), collator, data if data is not None else found, callbacks=callbacks)


def run(folder: Path, kind: str, out: Path, resume: bool = False, **keys: Any) -> None:
    """Train to the end and save the final model, as a script of the stock stack does."""
    made = trainer(folder, kind, out, **keys)
    made.train(resume_from_checkpoint=True if resume else None)
    made.save_model(str(out))
