"""What of a model is trained: everything, the head alone (a linear probe), or low-rank updates.

LoRA: Hu et al. 2021 (arXiv:2106.09685), by peft. The updates are merged before the model is scored or saved, so that
what is left is an ordinary checkpoint.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from lmssl.errors import UserError
from lmssl.models import drawn


def peft() -> Any:
    """The library of low-rank updates."""
    try:
        import peft
    except ImportError:
        raise UserError("task.method: lora needs peft; pip install 'lmssl[tasks]'") from None
    return peft


def apply(model: PreTrainedModel, method: str, rank: int) -> PreTrainedModel:
    """Freeze what the method does not train. The head, which no checkpoint has, is always trained.

    Args:
        method: "full", "probe" or "lora".
        rank: of the low-rank updates; their scale is alpha / rank = 2.
    """
    if method == "full":
        return model
    new = {id(p) for name, p in model.named_parameters() if name in drawn(model)}
    if method == "lora":
        library = peft()
        heads = {name.rpartition(".")[0] for name in drawn(model)}
        library.inject_adapter_in_model(library.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", exclude_modules=sorted(heads) or None), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = id(parameter) in new or ".lora_" in name
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"task.method: {method} finds nothing to train: this checkpoint has the task's head already; use full")
    return model


def merge(model: PreTrainedModel, method: str) -> PreTrainedModel:
    """The model with its low-rank updates added to its weights, and their modules gone."""
    if method == "lora":
        from peft.tuners.lora import LoraLayer

        for name, module in list(model.named_modules()):
            if isinstance(module, LoraLayer):
                module.merge()
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module.get_base_layer())
        if hasattr(model, "peft_config"):
            del model.peft_config
        model._hf_peft_config_loaded = False
    return model
