"""The weights of a checkpoint reach every head that is put on it, and what is saved loads again."""

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification

from lmssl import models
from lmssl.errors import UserError
from lmssl.tasks.base import Backbone
from tests.helpers import SMALL, small_model, token_set

NEW = ("score", "classifier", "qa_outputs", "classification_head", "head.", "pooler")
"""What a language model has not: the heads, and BERT's pooler."""


def keep(model, tokens, folder):
    model.save_pretrained(folder)
    tokens.tokenizer.save(folder)
    return Backbone.load(str(folder), 16, ["0", "1"])


@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModelForQuestionAnswering], ids=["classification", "question answering"])
@pytest.mark.parametrize("architecture", [*SMALL, "mistral", "qwen2", "electra"])
def test_every_weight_arrives_and_is_saved_under_the_heads_own_names(architecture, auto, shared_dir, tmp_path):
    """In transformers 5.23 the question-answering head of Llama and Qwen2 calls the model beneath it otherwise."""
    tokens, kin = token_set(shared_dir), {"mistral": "llama", "qwen2": "llama", "electra": "bert"}
    if architecture in SMALL:
        pretrained = small_model(architecture, tokens.vocab())
    else:
        config = transformers.AutoConfig.for_model(architecture, vocab_size=tokens.vocab().size, pad_token_id=0, **SMALL[kin[architecture]])
        pretrained = (transformers.AutoModelForMaskedLM if architecture == "electra" else transformers.AutoModelForCausalLM).from_config(config)
    model = keep(pretrained, tokens, tmp_path / "backbone").build(auto, True, 0)
    assert all(any(name in new for name in NEW) for new in models.drawn(model)), sorted(models.drawn(model))
    assert torch.equal(model.get_input_embeddings().weight, pretrained.get_input_embeddings().weight)
    model.save_pretrained(tmp_path / "tuned")
    _, info = auto.from_pretrained(tmp_path / "tuned", output_loading_info=True)
    assert not info["missing_keys"]
    assert set(load_file(tmp_path / "tuned" / "model.safetensors")) <= set(model.state_dict())


def test_weights_that_do_not_reach_the_head_are_refused(shared_dir, tmp_path):
    """A checkpoint whose names are of another model must not train a random one and call it pretrained."""
    from safetensors.torch import save_file

    backbone = keep(small_model("bert", token_set(shared_dir).vocab()), token_set(shared_dir), tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({f"somewhere.{name}": value for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="its weights do not reach BertForSequenceClassification"):
        backbone.build(AutoModelForSequenceClassification, True, 0)


def test_a_checkpoint_without_padding_token_classifies_batches(shared_dir, tmp_path):
    """GPT-2 and Llama from the hub name none."""
    tokens = token_set(shared_dir)
    pretrained = small_model("gpt2", tokens.vocab())
    pretrained.config.pad_token_id = None
    model = keep(pretrained, tokens, tmp_path).build(AutoModelForSequenceClassification, True, 0)
    assert model(input_ids=torch.ones(3, 8, dtype=torch.long)).logits.shape == (3, 2)
