"""Checkpoints of others, continued and fine-tuned: their tokens, names and sizes are kept."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from lmssl import arguments, config, evidence, history, tokenization
from lmssl.cli import run
from lmssl.errors import UserError
from lmssl.models import build
from lmssl.objectives import MaskedTokens
from lmssl.recipe import PretrainRecipe
from lmssl.runs import pretrain
from lmssl.tasks.base import Backbone
from lmssl.tasks.sentiment import Sentiment
from tests.helpers import SMALL, saved_backbone, sentences, small_model, token_set

WORDS = sorted({word.strip(".,").lower() for text in sentences(300) for word in text.split()})


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """As google-bert's: no settings name a special token, LayerNorm has its old names, there is room for more tokens than are read."""
    folder = tmp_path_factory.mktemp("bert")
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false, "model_max_length": 64}')
    sizes = SMALL["bert"] | {"max_position_embeddings": 64, "vocab_size": len(WORDS) + 5}
    transformers.BertForMaskedLM(transformers.BertConfig(**sizes)).save_pretrained(folder)
    old = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v for k, v in load_file(folder / "model.safetensors").items()}
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def recipe_of(bert, corpus_file, out, **trainer):
    data = {"text": str(corpus_file), "seq_length": 32, "held_out": 0.1}
    trainer = {"output_dir": str(out), "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "bf16": False, **trainer}
    return PretrainRecipe.of({"data": data, "model": {"from": str(bert)}, "objective": {"name": "masked"}, "trainer": trainer})


def resumed(recipe, out, auto):
    """The model of a finished run of four steps whose last two are made again, read by plain transformers."""
    shutil.rmtree(out / "checkpoint-4")
    for name in ("metrics.json", "model.safetensors"):
        (out / name).unlink()
    assert pretrain(recipe, resume=True, quiet=True)["steps"] == 4
    model, info = auto.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model


def test_special_tokens_are_those_of_the_architecture(bert):
    tokenizer = tokenization.load(bert)
    assert tokenizer.roles == {"pad": "[PAD]", "bos": "[CLS]", "eos": "[SEP]", "mask": "[MASK]"}


def test_a_checkpoint_of_somebody_else_s_is_continued_and_resumed(bert, corpus_file, tmp_path):
    recipe = recipe_of(bert, corpus_file, tmp_path / "run")
    pretrain(recipe, quiet=True)
    assert len(tokenization.load(tmp_path / "run").backend.get_vocab()) == len(WORDS) + 5, "nothing is added that is there"
    assert not any("gamma" in name or "beta" in name for name in load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors"))
    resumed(recipe, tmp_path / "run", transformers.AutoModelForMaskedLM)


def test_a_continued_checkpoint_is_not_overrun(bert, corpus_file, tmp_path):
    """A new model's rate would undo it; a classifier reads as much as it was trained on, not all that there are positions for."""
    metrics = pretrain(recipe_of(bert, corpus_file, tmp_path / "run", max_steps=1), quiet=True)
    assert metrics["curve"][0]["step"] == 0
    assert 0 < metrics["curve"][0]["held_out_loss"] != metrics["held_out"]["loss"]
    assert config.of_folder(tmp_path / "run")["trainer"]["learning_rate"] == arguments.pretrain_defaults(continued=True)["learning_rate"] == 1e-4
    assert Backbone.load(str(tmp_path / "run")).length == 32
    assert Backbone.load(str(bert)).length == 64


def test_the_verdict_says_what_else_was_bought(bert, corpus_file, tmp_path, capsys):
    pretrain(recipe_of(bert, corpus_file, tmp_path / "run", max_steps=1), quiet=True)
    args = ["task.labels=[8]", "task.seeds=2", "trainer.max_steps=1", "data.test=0.2", f"data.train={corpus_file}", f"model.from={tmp_path / 'run'}"]
    assert run(["finetune", "recipes/finetune/quickstart.yaml", *args, f"trainer.output_dir={tmp_path / 'out'}"]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["continued_from"] == str(bert)
    assert f"this counts what {bert} brought" in evidence.verdict(metrics)
    assert "this counts what" in capsys.readouterr().out


def test_sentinels_that_are_ordinary_pieces():
    """mT5's."""
    backend = Tokenizer(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁<extra_id_{i}>", -1.0) for i in range(100))], 2))
    found = tokenization._assemble(backend, {"pad_token": "<pad>", "eos_token": "</s>"}, "")
    assert len(found.sentinels) == 100
    assert found.sentinels[0] == "▁<extra_id_0>"
    found.complete()
    assert found.sentinels[0] == "▁<extra_id_0>", "what is there is not made again"


def test_a_sentencepiece_model_alone_names_its_packages(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x07nothing")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    with pytest.raises(UserError, match="pip install sentencepiece protobuf"):
        tokenization.load(tmp_path)


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "tie_word_embeddings": False}
MIXTURE = {"num_key_value_heads": 2, "num_local_experts": 2, "head_dim": 16, "num_experts_per_tok": 1}


@pytest.mark.parametrize(("architecture", "more", "continued"), [("gpt_neox", {}, True), ("mixtral", MIXTURE, False)])
def test_an_architecture_whose_weights_have_other_names_on_the_hub_is_resumed(architecture, more, continued, corpus_file, tmp_path):
    """Their files on the hub say embed_out, or have each expert apart; transformers reads either."""
    model = {"architecture": architecture, **SIZES, **more}
    trainer = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "bf16": False}
    data = {"text": str(corpus_file), "tokenizer": "tokenizer_assets/bpe-8k", "seq_length": 32, "held_out": 0.1}
    if continued:
        made = PretrainRecipe.of({"data": data, "model": model, "objective": {"name": "next_token"}, "trainer": trainer | {"max_steps": 1, "output_dir": str(tmp_path / "first")}})
        pretrain(made, quiet=True)
        first = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "first")
        first._weight_conversions = None  # as a model that was not read
        first.save_pretrained(tmp_path / "first")
        names, own = load_file(tmp_path / "first" / "model.safetensors").keys(), first.state_dict().keys()
        assert names != own
        data, model = {k: v for k, v in data.items() if k != "tokenizer"}, {"from": str(tmp_path / "first")}
    recipe = PretrainRecipe.of({"data": data, "model": model, "objective": {"name": "next_token"}, "trainer": trainer | {"output_dir": str(tmp_path / "run")}})
    pretrain(recipe, quiet=True)
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run").state_dict()
    again = resumed(recipe, tmp_path / "run", transformers.AutoModelForCausalLM)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.items())


def test_a_head_that_a_checkpoint_lacks_is_drawn_from_the_seed(bert, tmp_path):
    body = transformers.BertModel(transformers.BertConfig.from_pretrained(bert))
    body.save_pretrained(tmp_path)
    vocab, heads = tokenization.load(bert).vocab(), []
    for state, seed in ((1, 0), (2, 0), (2, 1)):
        torch.manual_seed(state)
        heads.append(build({"from": str(tmp_path)}, vocab, MaskedTokens(), 32, seed).cls.predictions.transform.dense.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[1], heads[2])


@pytest.mark.parametrize(
    "text",
    [b"default_stage: {default_modifiers: {}}", b"model: meta-llama/Llama", b"data: somewhere", b"[1, 2]", b"just text", b"caf\xe9: 1", b"stage:\n  - !EpochRangeModifier {}\n"],
)
def test_a_recipe_of_another_program_says_nothing_of_a_run(text, shared_dir, tmp_path):
    """llm-compressor and others leave a recipe.yaml in a checkpoint, too."""
    saved_backbone("bert", token_set(shared_dir), tmp_path)
    (tmp_path / "recipe.yaml").write_bytes(text)
    assert config.of_folder(tmp_path) == {}
    assert not Backbone.load(str(tmp_path)).began_local()
    assert "not known" in history.leak_check(str(tmp_path), [])["reason"]


def test_a_t5_whose_configuration_names_no_start_is_given_one(corpus_file, shared_dir, tmp_path):
    """As transformers' own T5Config() has it; without one neither `generate` nor a classifier of plain transformers begins."""
    tokens = token_set(shared_dir)
    made = small_model("t5", tokens.vocab())
    made.config.decoder_start_token_id = made.generation_config.decoder_start_token_id = None
    made.save_pretrained(tmp_path / "t5")
    tokens.tokenizer.save(tmp_path / "t5")
    sections = {"data": {"text": str(corpus_file), "seq_length": 32, "held_out": 0.1}, "model": {"from": str(tmp_path / "t5")}, "objective": {"name": "span_corruption"}}
    pretrain(PretrainRecipe.of(sections | {"trainer": {"output_dir": str(tmp_path / "run"), "max_steps": 1, "bf16": False}}), quiet=True)
    start = tokens.vocab().start
    written = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run").generate(torch.tensor([[7, 8, 1]]), max_new_tokens=3)
    assert written[0, 0] == start
    backbone = Backbone.load(str(tmp_path / "t5"), 32, ("a", "b"))
    assert Sentiment().model(backbone, True, 0).config.decoder_start_token_id == start
