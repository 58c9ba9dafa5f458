"""Recipes: typed, refused with a suggestion, and the same again after a round trip."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Literal

import pytest
import yaml

from lmssl import arguments, config
from lmssl.cli import run
from lmssl.errors import UserError
from lmssl.recipe import FinetuneRecipe, PretrainRecipe

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E3", 1000.0),
        ("3", 3),
        ("1.5", 1.5),
        (".5", 0.5),
        ("-2", -2),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("2020-01-01", "2020-01-01"),
        ("2024_11_05", "2024_11_05"),
        ("1:30", "1:30"),
        ("0100", "0100"),
        ("1_000_000", 1_000_000),
        ("0x1F", 31),
        ("+5", 5),
        ("[20, 1e2]", [20, 100.0]),
        ("a b", "a b"),
    ],
)
def test_scalars(text, value):
    assert config.parse_yaml(text, "x") == value


@dataclasses.dataclass(frozen=True)
class Sample:
    count: int
    rate: float = 0.1
    kind: Literal["a", "b"] = "a"
    many: list[int] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        if self.count < 0:
            raise ValueError(f"count={self.count} must not be negative")


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"cout": 1}, r"s.cout: unknown key; did you mean 'count'"),
        ({}, r"s.count: missing"),
        ({"count": "x"}, r"s.count: expected a whole number, got 'x'"),
        ({"count": True}, r"s.count: expected a whole number, got True"),
        ({"count": 1, "kind": "c"}, r"s.kind: expected one of a, b"),
        ({"count": -1}, r"s: count=-1 must not be negative"),
        ({"count": 1, "many": 3}, r"s.many: expected a list of a whole number"),
        ({"count": 1.5}, r"s.count: expected a whole number"),
    ],
)
def test_build_refuses(mapping, message):
    with pytest.raises(UserError, match=message):
        config.build(Sample, mapping, "s")


def test_build():
    assert config.build(Sample, {"count": 2, "rate": 1, "many": [1]}, "s") == Sample(2, 1.0, "a", [1])


def test_an_override_may_begin_as_no_yaml_does():
    for value in ("*.jsonl", "#2", "@x", "!a", "`b`"):
        assert config.apply_overrides({}, [f"data.text={value}"], ("data",)) == {"data": {"text": value}}


def test_signs_are_text_and_numbers_are_numbers():
    for value in ("---", "...", "=", " = ", "?", "- ", ", ", "<<", "-> ", "<sep>"):
        assert config.apply_overrides({}, [f"task.separator={value}"], ("task",)) == {"task": {"separator": value}}
    for value, found in (("-1", -1), ("-1e-4", -1e-4), (".5", 0.5), ("-.inf", -math.inf)):
        assert config.apply_overrides({}, [f"task.x={value}"], ("task",)) == {"task": {"x": found}}
    assert config.parse_yaml("a: =\nb: <<", "x") == {"a": "=", "b": "<<"}


def test_texts_that_look_like_numbers_survive_a_recipe():
    recipe = {"task": {"label": "0100", "text": "1:30", "run": "2024_11_05", "count": 1000, "odd": "1_000", "rate": "1e3"}}
    assert config.parse_yaml(config.dump(recipe), "x") == recipe


def test_a_recipe_without_other_letters_is_the_same_recipe():
    recipe = {"data": {"text": "東京.txt", "column": "naïve"}}
    assert config.dump(recipe, ascii=True).isascii()
    assert config.parse_yaml(config.dump(recipe, ascii=True), "x") == recipe


def test_a_checkpoint_may_be_called_by_a_number():
    sections = {"data": {"text": "x"}, "model": {"from": 2024}, "objective": {"name": "masked"}, "trainer": {}}
    assert PretrainRecipe.of(sections).continued == "2024"
    sections = {"data": {"train": "x"}, "model": {"from": 2024}, "task": {"name": "sentiment"}, "trainer": {}}
    assert FinetuneRecipe.of(sections).source == "2024"


BASE = """
data:      {text: %s, tokenizer: tokenizer_assets/bpe-8k, seq_length: 32}
model:     {architecture: bert, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}
objective: {name: masked}
trainer:   {output_dir: %s, max_steps: 2}
"""

BAD_RECIPES = [
    (["objective.rat=0.3"], "objective.rat: unknown key; did you mean 'rate'"),
    (["objective.rate=1.5"], "objective: rate=1.5 must be above 0.0 and at most 1.0"),
    (["objective.rate=true"], "objective.rate: expected a number, got True"),
    (["objective.unit=span", "objective.span_max=1000000000"], "span_max=1000000000 must be between 1 and 10,000 words"),
    (["objective.rate=lots"], "objective.rate: expected a number, got 'lots'"),
    (["objective.name=maskd"], "objective.name: nothing is called 'maskd'; did you mean 'masked'"),
    (["objective.name=next_token"], "'bert' is an encoder"),
    (["objective.name=no_such_module:Thing"], "cannot be imported"),
    (["model.hiden_size=48"], "model.hiden_size: unknown key; did you mean 'hidden_size'"),
    (["model.architecture=brt"], "did you mean 'bert'"),
    (["model.vocab_size=77"], "the tokenizer has 8192 ids"),
    (["model.max_position_embeddings=8"], "need 32"),
    (["model.hidden_size=33"], "cannot be built|refuses"),
    (["data.seq_length=4"], "seq_length=4 must be at least 8"),
    (["data.held_out=1.5"], "held_out=1.5 must be a fraction"),
    (["data.text=missing.jsonl"], "no such file or folder: missing.jsonl"),
    (["data.tokenizer=tokenizer_assets/bpe-9k"], "bpe-9k"),
    (["data.txt=x"], "data.txt: unknown key; did you mean 'text'"),
    (["trainer.learning_rat=1e-3"], "did you mean 'learning_rate'"),
    (["trainer.learning_rate=-1"], "trainer.learning_rate: -1.0 must be above 0"),
    (["trainer.max_steps=0"], "trainer.max_steps: 0 must be above 0"),
    (["trainer.max_steps=many"], "trainer.max_steps: expected a whole number"),
    (["trainer.per_device_train_batch_size=0"], "must be above 0"),
    (["trainer.save_strategy=stpes"], "trainer"),
    (["trainer.lr_scheduler_type=cosin"], "trainer"),
    (["trainer.save_total_limit=3"], "trainer.save_total_limit: not to be set: lmssl keeps"),
    (["trainer.label_smoothing_factor=0.1"], "not to be set"),
    (["trainer.optimizer=sgd"], "one of adamw, muon"),
    (["trainer.num_train_epochs=3"], "keep one of them"),
    (["trainer.adam_beta1=1.5"], "below 1"),
    (["trainer.warmup_steps=.nan"], "not a finite number"),
    (["modell.x=1"], "unknown section 'modell'; did you mean 'model'"),
    (["nonsense"], "unrecognized|override reads"),
    (["trainer.output_dir=pyproject.toml"], "is a file"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD_RECIPES, ids=[o[0] for o, _ in BAD_RECIPES])
def test_bad_recipe_is_one_line_and_exit_2(overrides, message, tmp_path, corpus_file, capsys):
    import re

    (tmp_path / "r.yaml").write_text(BASE % (corpus_file, tmp_path / "run"))
    status = run(["pretrain", str(tmp_path / "r.yaml"), *overrides])
    error = capsys.readouterr().err.strip().splitlines()
    assert status == 2
    assert error[-1].startswith("lmssl: error: ")
    assert re.search(message, error[-1]), error[-1]
    assert not any("Traceback" in line for line in error)
    assert not (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: [1", r"r.yaml:\d+: not valid YAML"),
        ("data: {a: 1, a: 2}", "the key 'a' stands twice"),
        ("data: 3", "data: expected a mapping"),
        ("data: {text: *.jsonl}", r"r.yaml:1: not valid YAML: .*begins with \* needs quotes"),
        ("[1, 2]", "a recipe is a mapping"),
        ("data: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("data: {text: x, tokenizer: y}", "the section 'model' is missing"),
        ("\xff", "UTF-8|mapping"),
    ],
)
def test_bad_files(text, message, tmp_path, capsys):
    import re

    (tmp_path / "r.yaml").write_bytes(text.encode("latin-1"))
    assert run(["pretrain", str(tmp_path / "r.yaml")]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_missing_recipe(capsys):
    assert run(["pretrain", "no/such.yaml"]) == 2
    assert "no such recipe" in capsys.readouterr().err


def test_dump_round_trip():
    recipe = {"data": {"text": ["a", "b"], "held_out": 1e-05, "no": "no"}, "trainer": {"bf16": True, "x": None, "t": "1e-4", "odd": " a\x85b\u2028c\ufeff", "cue": " 这部电影"}}
    for ascii in (False, True):
        assert config.parse_yaml(config.dump(recipe, ascii), "x") == recipe


def test_resolved_section_gives_the_same_arguments(tmp_path):
    section = {"output_dir": str(tmp_path), "learning_rate": 1e-3}
    first = arguments.with_steps(arguments.resolve(section, arguments.pretrain_defaults()), 100)
    again = arguments.with_steps(arguments.resolve(yaml.safe_load(yaml.safe_dump(first)), arguments.pretrain_defaults()), 100)
    assert first == again
    assert arguments.build(first).to_dict() == arguments.build(again).to_dict()


def test_epochs_become_steps(tmp_path):
    section = {"output_dir": str(tmp_path), "num_train_epochs": 2, "per_device_train_batch_size": 4, "warmup_steps": 3}
    values = arguments.with_steps(arguments.resolve(section, arguments.pretrain_defaults()), 10)
    assert (values["max_steps"], values["warmup_steps"], "num_train_epochs" in values) == (5, 3, False)


def test_missing_sections_and_paths(tmp_path):
    with pytest.raises(UserError, match=r"data.tokenizer: missing"):
        PretrainRecipe.of({"data": {"text": "x"}, "model": {"architecture": "bert"}, "objective": {"name": "masked"}, "trainer": {}})
    with pytest.raises(UserError, match=r"recipe: model: expected a mapping of keys to values, got 'gpt2'"):
        PretrainRecipe.of({"data": {"text": "x"}, "model": "gpt2", "objective": {"name": "masked"}, "trainer": {}})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.architecture=[]"], "model.architecture: expected the name"),
        (["trainer.output_dir=null"], "trainer.output_dir: missing"),
        (["trainer.output_dir=''"], "trainer.output_dir: missing"),
        (["trainer.per_device_train_batch_size=9223372036854775808"], r"must lie between -2\^31 and 2\^32"),
        ([f"data.text={'a' * 300}"], "File name too long"),
    ],
    ids=["architecture", "null", "empty", "huge", "long"],
)
def test_found_by_the_fuzzer(overrides, message, tmp_path, corpus_file, capsys):
    test_bad_recipe_is_one_line_and_exit_2(overrides, message, tmp_path, corpus_file, capsys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("data.test=-0.5", "fraction above 0"),
        ("task.labels=[true]", r"task.labels: expected a list of a whole number, got \[True\]"),
        ("data.max_length=-1", "at least 8 tokens"),
        ("task.name={a: 1}", "expected a name"),
        (f"model.from={'a' * 300}", "too long"),
    ],
)
def test_found_by_the_fuzzer_in_fine_tuning(keys, message, tmp_path, capsys):
    import re

    (tmp_path / "r.yaml").write_text(f"task: {{name: sentiment}}\ndata: {{train: x.jsonl}}\nmodel: {{from: nowhere}}\ntrainer: {{output_dir: {tmp_path / 'out'}}}\n")
    assert run(["finetune", str(tmp_path / "r.yaml"), keys]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("name", sorted(arguments.OWNED_BY_TASKS))
def test_what_is_not_to_be_set(name):
    """Refused with its reason in fine-tuning and, but for what belongs to tasks, in pretraining; the page lists it."""
    for defaults, owned in ((arguments.pretrain_defaults(), arguments.OWNED), (arguments.finetune_defaults(), arguments.OWNED_BY_TASKS)):
        if name in owned:
            with pytest.raises(UserError, match=f"trainer.{name}: not to be set: {re.escape(owned[name])}"):
                arguments.resolve({"output_dir": "x", name: 7}, defaults, owned)
    page = (ROOT / "docs" / "recipes.md").read_text().split("## Trainer fields that are not to be set")[1].split("## Definitions")[0]
    assert f"`{name}`" in page


def test_float32_is_float32_on_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("lmssl.machine.native_bf16", lambda device: True)
    assert arguments.hardware_defaults()["tf32"] is False


def test_the_documented_defaults_are_the_defaults():
    """Every field of the table in docs/recipes.md that is a plain value."""
    text = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text().partition("| field | pretraining | fine-tuning |")[2]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in text.partition("\n\n")[0].splitlines()[2:]]
    checked = 0
    for name, *values in rows:
        for value, defaults in zip(values, (arguments.pretrain_defaults(), arguments.finetune_defaults()), strict=True):
            if name in defaults and not isinstance(defaults[name], bool) and name != "dataloader_num_workers":  # whose value is the machine's
                assert value.split(",")[0] == str(defaults[name]), name
                checked += 1
    assert checked >= 15


def test_a_cpu_beside_a_gpu_has_its_own_precision_and_workers(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("lmssl.machine.native_bf16", lambda device: device == "cuda")
    monkeypatch.setattr("lmssl.machine.device", lambda: "cuda")
    assert arguments.pretrain_defaults()["bf16"]
    values = arguments.resolve({"output_dir": "x", "use_cpu": True}, arguments.pretrain_defaults())
    assert not values["bf16"]
    assert not {"tf32", "dataloader_num_workers"} & set(values)


def test_how_to_compile_says_that_it_is_compiled():
    assert arguments.resolve({"output_dir": "x", "torch_compile_mode": "default"}, arguments.pretrain_defaults())["torch_compile"] is True


def test_a_folder_at_home_is_one_folder(monkeypatch, tmp_path):
    """For what looks there before a run and for what writes there."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert arguments.resolve({"output_dir": "~/run"}, arguments.finetune_defaults())["output_dir"] == f"{tmp_path}/run"
