"""What a caller from Python may get wrong: each is one line with a way out."""

import dataclasses

import pytest
import torch
import transformers

import lmssl
from lmssl import PretrainTrainer
from lmssl.errors import UserError
from lmssl.objectives import MaskedTokens, NextToken, fields_of, make
from lmssl.recipe import FinetuneRecipe
from tests import helpers
from tests.helpers import sentences, small_model, token_set


@pytest.mark.parametrize(("keys", "message"), [({"optimizer": "sgd"}, "optimizer: expected one of adamw, muon, got 'sgd'"), ({"on_spike": "never"}, "on_spike: expected one of ")])
def test_words_from_python_are_checked(keys, message, shared_dir, tmp_path):
    tokens = token_set(shared_dir)
    with pytest.raises(UserError, match=message):
        PretrainTrainer(small_model("bert", tokens.vocab()), MaskedTokens(), tokens, helpers.arguments(tmp_path), 32, quiet=True, **keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"optim": "adafactor"}, "optim: adafactor configures AdamW and its kin, but the optimizer is muon"),
        ({"eval_strategy": "epoch"}, "eval_strategy: a run is one pass of max_steps"),
        ({"max_steps": -1, "num_train_epochs": 1}, "max_steps: -1 must be at least 1 optimizer step .*epochs"),
    ],
)
def test_arguments_from_python_are_checked(keys, message, shared_dir, tmp_path):
    tokens = token_set(shared_dir)
    with pytest.raises(UserError, match=message):
        PretrainTrainer(small_model("bert", tokens.vocab()), MaskedTokens(), tokens, helpers.arguments(tmp_path, **keys), 32, optimizer="muon", quiet=True)


def test_early_stopping_says_what_it_wants(shared_dir, tmp_path, caplog):
    tokens, keys = token_set(shared_dir), {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 4, "learning_rate": 1e-9, "warmup_steps": 4}
    for more in ({}, {"metric_for_best_model": "loss"}):
        trainer = PretrainTrainer(small_model("bert", tokens.vocab()), MaskedTokens(), tokens, helpers.arguments(tmp_path, **keys, **more), 32, quiet=True)
        assert "trainer.warmup_steps: 4 of 4 steps, so that the learning rate is never reached" in caplog.text
        trainer.add_callback(transformers.EarlyStoppingCallback(1, 10.0))
        if more:
            trainer.run()
            assert trainer.state.global_step == 2
        else:
            with pytest.raises(UserError, match=r"callbacks: EarlyStoppingCallback requires .*; of TrainingArguments: metric_for_best_model='loss'"):
                trainer.run()


@dataclasses.dataclass(frozen=True)
class Mixture(NextToken):
    """A part is an objective, as in UL2."""

    part: MaskedTokens = dataclasses.field(default_factory=MaskedTokens)


def test_a_part_of_an_objective_is_read_as_it_is_written():
    made = make({"name": f"{__name__}:Mixture", "part": {"rate": 0.3, "unit": "word"}})
    assert made.part == MaskedTokens(rate=0.3, unit="word")
    assert make(fields_of(made)) == made
    with pytest.raises(UserError, match=r"objective.part.rat: unknown key; did you mean 'rate'"):
        make({"name": f"{__name__}:Mixture", "part": {"rat": 0.3}})
    with pytest.raises(UserError, match=r"objective.part: expected a mapping of the fields of MaskedTokens, got 3"):
        make({"name": f"{__name__}:Mixture", "part": 3})


@pytest.mark.parametrize(("needs", "told"), [(frozenset({"pad", "mask"}), "'pad'"), ({"mask", 3}, "3"), ("mask", "'mask'"), (None, "None")])
def test_what_an_objective_may_need(needs, told, monkeypatch):
    monkeypatch.setattr(Mixture, "needs", needs, raising=False)
    with pytest.raises(UserError, match=f"Mixture' needs {told}; a set of 'mask' and 'sentinels', which a tokenizer may have"):
        make({"name": f"{__name__}:Mixture"})


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"objective": MaskedTokens}, "objective: expected an objective, got the class MaskedTokens; for example"),
        ({"objective": "masked"}, "objective: expected an objective, got 'masked'"),
        ({"train_dataset": ["a", "b"]}, "train_dataset: expected a token set, got list; lmssl.prepare or lmssl.from_iterable makes one"),
        ({"model": torch.nn.Linear(2, 2)}, "model: expected a model of transformers, got Linear"),
        ({"seq_length": 0}, "seq_length: 0 must be at least 8 tokens"),
        ({"seq_length": 64}, "seq_length: 64 needs 64 positions, the model has 32"),
    ],
)
def test_what_a_trainer_is_not_made_of(parts, message, shared_dir, tmp_path):
    tokens = token_set(shared_dir)
    usual = {
        "model": small_model("bert", tokens.vocab()),
        "objective": MaskedTokens(),
        "train_dataset": tokens,
        "args": helpers.arguments(tmp_path),
        "seq_length": 32,
        "quiet": True,
    }
    with pytest.raises(UserError, match=message):
        PretrainTrainer(**usual | parts)


class Table(dict):
    """As a pandas DataFrame behaves: iterating gives names of columns."""

    columns = ("text", "label")

    def __iter__(self):
        return iter(self.columns)


def test_what_python_would_take_apart_is_refused(tmp_path):
    for texts in ("hello world", Table(), {"a": 1}):
        for maker in (lambda texts: lmssl.from_iterable(texts, helpers.tokenizer(), tmp_path / "x"), lmssl.train_tokenizer):
            with pytest.raises(UserError, match=r"texts: expected documents, one after the other, got a (str|Table|dict)"):
                maker(texts)
    with pytest.raises(UserError, match=r"document 1: expected text, got NoneType"):
        lmssl.train_tokenizer([None])
    sections = {"task": {"name": "sentiment"}, "data": {"train": Table()}, "model": {"from": "x"}, "trainer": {}}
    with pytest.raises(UserError, match=r"data.train: expected .*, got a Table; write it to a file"):
        FinetuneRecipe.of(sections)
    assert FinetuneRecipe.of(sections | {"data": {"train": tmp_path / "x.jsonl", "test": [tmp_path / "y.jsonl"]}}).data.test == [str(tmp_path / "y.jsonl")]


@pytest.mark.parametrize("held_out", [-1, 1, 1.5, float("nan"), "0.1"])
def test_a_held_out_share_is_one(held_out, tmp_path):
    with pytest.raises(UserError, match=r"held_out: .* must be a fraction of 0 or more and below 1"):
        lmssl.from_iterable(sentences(10), helpers.tokenizer(), tmp_path / "x", held_out)


def test_prepare_needs_its_own_tokenizer(tmp_path):
    (tmp_path / "x.txt").write_text("a film\n")
    with pytest.raises(UserError, match=r"tokenizer: expected lmssl's own, got str; lmssl.load_tokenizer\(FOLDER\) makes one"):
        lmssl.prepare(tmp_path / "x.txt", "tokenizer_assets/bpe-8k")
