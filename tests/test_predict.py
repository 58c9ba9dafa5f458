"""`lmssl predict`: files and standard input, and what it refuses."""

import io
import json
import shutil
import sys

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from lmssl import predict
from lmssl.cli import run
from lmssl.errors import Stopped, UserError
from lmssl.tasks import make_task
from lmssl.tasks.base import Backbone
from lmssl.tasks.qa import QuestionAnswering
from lmssl.tasks.sentiment import Sentiment
from tests.helpers import saved_backbone, small_model, token_set


@pytest.fixture(scope="module")
def classifier(shared_dir, tmp_path_factory):
    """A classifier without a recipe, as somebody else may have made it."""
    tokens, folder = token_set(shared_dir), tmp_path_factory.mktemp("classifier")
    small_model("bert", tokens.vocab(), 32).save_pretrained(folder / "backbone")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "backbone", id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    model.save_pretrained(folder / "model")
    tokens.tokenizer.save(folder / "model")
    tokens.tokenizer.save(folder / "backbone")
    return folder / "model"


def test_files_and_standard_input_agree(classifier, tmp_path, monkeypatch, capsys):
    lines = ["the film was good", "a dull plot", "warm and slow, truly"]
    (tmp_path / "a.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "b.csv").write_text("id,review\n" + "".join(f'{n},"{line}"\n' for n, line in enumerate(lines)))
    shown = []
    for files in (["a.txt"], ["b.csv", "task.text=review"], []):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
        names = [str(tmp_path / f) if "=" not in f else f for f in files]
        assert run(["predict", str(classifier), *names, "--task", "sentiment", "--batch", "2"]) == 0
        shown.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert [row["where"] for row in shown[2]] == ["stdin:1", "stdin:2", "stdin:3"]
    for rows in shown:
        assert [{k: v for k, v in row.items() if k != "where"} for row in rows] == [{k: v for k, v in row.items() if k != "where"} for row in shown[0]]
        assert all(row["label"] in ("bad", "good") and sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5) for row in rows)
        assert all(row["probabilities"][row["label"]] == max(row["probabilities"].values()) for row in rows)
    assert run(["predict", str(classifier), str(tmp_path / "a.txt"), "--task", "sentiment", "--out", str(tmp_path / "out.jsonl")]) == 0
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == shown[0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "no recipe.yaml that says what it was fine-tuned for"),
        (["--task", "sentimnt"], "did you mean 'sentiment'"),
        (["--task", "sentiment", "nowhere.jsonl"], "no such file"),
        (["--task", "sentiment", "task.txt=x"], "did you mean"),
        (["--task", "sentiment", "--batch", "0"], "--batch: 0"),
        (["--task", "qa", "LINES"], "has no weights for qa"),
    ],
)
def test_refusals(args, message, classifier, tmp_path, capsys):
    (tmp_path / "lines.txt").write_text("a film\n")
    assert run(["predict", str(classifier), *(str(tmp_path / "lines.txt") if a == "LINES" else a for a in args)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]
    assert run(["predict", str(classifier.parent / "nothing"), "--task", "qa"]) == 2


def test_lines_hold_no_question_and_blank_ones_nothing(tmp_path):
    (tmp_path / "lines.txt").write_text("a film\n\n  \nanother\n")
    files = [str(tmp_path / "lines.txt")]
    with pytest.raises(UserError, match="a question and a context"):
        list(predict.examples(QuestionAnswering(), files))
    assert [e.text for e in predict.examples(Sentiment(), files)] == ["a film", "another"]


def test_a_backbone_without_a_head_predicts_nothing(classifier, capsys):
    """Its head would be drawn at random, and its answers with it."""
    assert run(["predict", str(classifier.parent / "backbone"), "--task", "sentiment"]) == 2
    assert "has no weights for sentiment" in capsys.readouterr().err


def test_a_model_without_its_language_head_is_not_scored(classifier, tmp_path, capsys):
    (tmp_path / "pairs.jsonl").write_text('{"sentence_good": "the film was good", "sentence_bad": "film the was good"}\n')
    for args in (["--pairs", str(tmp_path / "pairs.jsonl")], [f"data.text={tmp_path / 'pairs.jsonl'}::sentence_good"]):
        assert run(["evaluate", str(classifier), *args]) == 2
        assert "is no pretrained language model: cls.predictions" in capsys.readouterr().err
    assert run(["evaluate", str(classifier.parent / "backbone"), "--pairs", str(tmp_path / "pairs.jsonl")]) == 0


@pytest.mark.parametrize(("architecture", "fields", "shown"), [("gpt2", [], "'<s>what text says'"), ("bert", ["task.text_a=a", "task.text_b=b"], "without token types")])
def test_a_layout_of_somebody_else_s_is_not_guessed(architecture, fields, shown, shared_dir, tmp_path, capsys):
    """GPT-2's own classifiers read no bos, BERT's read token types."""
    tokens = token_set(shared_dir)
    small_model(architecture, tokens.vocab(), 32).save_pretrained(tmp_path / "backbone")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "backbone").save_pretrained(tmp_path / "model")
    tokens.tokenizer.save(tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    described = json.loads(path.read_text())
    if architecture == "gpt2":
        described["post_processor"] = None
    path.write_text(json.dumps(described))
    settings = tmp_path / "model" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}))
    (tmp_path / "x.csv").write_text("text,a,b\na film,a film,a plot\n")
    assert run(["predict", str(tmp_path / "model"), str(tmp_path / "x.csv"), "--task", "sentiment", *fields]) == 2
    error = capsys.readouterr().err
    assert "was not fine-tuned by lmssl" in error
    assert shown in error


def test_a_trained_head_keeps_its_pooling(shared_dir, tmp_path):
    tokens = token_set(shared_dir)
    small_model("modernbert", tokens.vocab(), 32).save_pretrained(tmp_path / "backbone")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "backbone", classifier_pooling="cls").eval()
    theirs.save_pretrained(tmp_path / "model")
    tokens.tokenizer.save(tmp_path / "model")
    _, backbone, model = predict.load(str(tmp_path / "model"), "sentiment")
    ids = torch.tensor([[*backbone.begin(), 300, 301, 302, tokens.tokenizer.id("eos")]])
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=1e-6)


@pytest.mark.parametrize(("encoding", "shown"), [(None, "é"), ("utf-8", "é"), ("latin-1", "\\u00e9")])
def test_predictions_are_json_on_any_terminal(encoding, shown, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding) if encoding else io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    predict.write(iter([{"a": "é"}]), None)
    out.seek(0)
    assert out.read() == f'{{"a": "{shown}"}}\n'


def test_no_length_is_no_mistake(classifier, tmp_path, capsys):
    """A tokenizer of somebody else's may say null."""
    shutil.copytree(classifier, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": None}))
    (tmp_path / "a.txt").write_text("a film\n")
    assert run(["predict", str(tmp_path / "model"), str(tmp_path / "a.txt"), "--task", "sentiment"]) == 0
    assert "label" in capsys.readouterr().out


def test_bad_lines(classifier, monkeypatch, capsys):
    for raw, message in [(b"fine\n\xff\n", "stdin:2: not UTF-8"), (b"{broken\n", "stdin:1: not valid JSON"), (b'{"txt": "x"}\n', "no column 'text'")]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        assert run(["predict", str(classifier), "--task", "sentiment"]) == 2
        assert message in capsys.readouterr().err


def test_a_file_may_be_called_as_an_override_begins(classifier, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.txt").write_text("a film\n")
    assert run(["predict", str(classifier), "task.txt", "--task", "sentiment"]) == 0
    assert json.loads(capsys.readouterr().out)["where"] == "task.txt:1"


@pytest.mark.parametrize("batch", ["1", "8"])
def test_predictions_before_a_bad_record_are_kept(classifier, batch, tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": f"film {n}"}) + "\n" for n in range(21)) + "{bad\n")
    assert run(["predict", str(classifier), str(path), "--task", "sentiment", "--batch", batch, "--out", str(tmp_path / "out.jsonl")]) == 2
    error = capsys.readouterr().err
    assert "x.jsonl:22" in error
    assert "the predictions before it are in" in error
    assert len((tmp_path / "out.jsonl.part").read_text().splitlines()) == 21


def test_predictions_before_a_signal_are_kept(classifier, tmp_path, monkeypatch, capsys):
    path, asked = tmp_path / "x.jsonl", []
    path.write_text("".join(json.dumps({"text": f"film {n}"}) + "\n" for n in range(40)))
    answer = Sentiment.predictions

    def stopped(self, *args):
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return answer(self, *args)

    monkeypatch.setattr(Sentiment, "predictions", stopped)
    assert run(["predict", str(classifier), str(path), "--task", "sentiment", "--batch", "1", "--out", str(tmp_path / "out.jsonl")]) == 130
    assert f"SIGINT: the predictions made until then are in {tmp_path / 'out.jsonl.part'}" in capsys.readouterr().err
    assert len((tmp_path / "out.jsonl.part").read_text().splitlines()) == predict.CHUNK


def test_memory_that_does_not_suffice_is_one_line(classifier, tmp_path, monkeypatch, capsys):
    (tmp_path / "x.txt").write_text("a film\n")

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Sentiment, "predictions", full)
    assert run(["predict", str(classifier), str(tmp_path / "x.txt"), "--task", "sentiment"]) == 2
    assert "a batch of 32 inputs does not fit into memory: a smaller --batch" in capsys.readouterr().err


def test_a_mark_of_byte_order_is_no_text(classifier, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'\xef\xbb\xbf{"text": "a film"}\n{"text": "a film"}\n')))
    assert run(["predict", str(classifier), "--task", "sentiment"]) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["probabilities"] == second["probabilities"]


def test_a_translator_of_somebody_else_s(shared_dir, tmp_path, capsys):
    """Where its tokenizer lays a text out as tasks do here, it writes; else it is refused by name."""
    tokens = token_set(shared_dir)
    small_model("t5", tokens.vocab(), 32).save_pretrained(tmp_path)
    tokens.tokenizer.save(tmp_path)
    (tmp_path / "x.txt").write_text("a film\n")
    args = ["predict", str(tmp_path), str(tmp_path / "x.txt"), "--task", "translation"]
    assert run(args) == 0, capsys.readouterr().err
    assert "translation" in json.loads(capsys.readouterr().out)
    described = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(described | {"post_processor": None}))
    assert run(args) == 2
    assert "its tokenizer makes" in capsys.readouterr().err


@pytest.mark.parametrize(("keys", "what"), [({"problem_type": "multi_label_classification"}, "any number of classes"), ({"problem_type": "regression"}, "a number")])
def test_what_no_single_class_answers_is_refused(classifier, keys, what, tmp_path, capsys):
    shutil.copytree(classifier, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    (tmp_path / "x.txt").write_text("a film\n")
    assert run(["predict", str(tmp_path / "model"), str(tmp_path / "x.txt"), "--task", "sentiment"]) == 2
    assert f"answers with {what}" in capsys.readouterr().err


def test_a_head_of_classes_says_so(classifier):
    task = make_task({"name": "sentiment"})
    loaded = Backbone.load(str(classifier.parent / "backbone"), classes=("bad", "good"))
    loaded.config.problem_type = "multi_label_classification"
    assert task.model(loaded, True, 0).config.problem_type == "single_label_classification"


def test_how_a_decoder_of_somebody_else_s_is_asked_is_not_guessed(shared_dir, tmp_path, capsys):
    backbone = tmp_path / "backbone"
    saved_backbone("llama", token_set(shared_dir), backbone, 64)
    (tmp_path / "x.txt").write_text("a film\n")
    assert run(["predict", str(backbone), str(tmp_path / "x.txt"), "--task", "translation"]) == 2
    assert "cannot know what stands between an input and its answer" in capsys.readouterr().err
    with pytest.raises(UserError, match="cannot know"):
        predict.load(str(backbone), "translation")


def test_a_line_is_read_alike_from_a_file_and_from_standard_input(tmp_path, monkeypatch):
    (tmp_path / "x.txt").write_text(" good film \n\n  {not json\r\n".replace("{", "("))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((tmp_path / "x.txt").read_bytes())))
    assert [e.text for e in predict.examples(Sentiment(), [])] == [e.text for e in predict.examples(Sentiment(), [str(tmp_path / "x.txt")])]


def test_standard_input_that_is_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="stdin: is closed; name a FILE"):
        list(predict.examples(Sentiment(), []))


def test_a_name_that_is_no_text_is_written(classifier, tmp_path):
    name = str(tmp_path / "caf\udce9.txt")
    with open(name, "w") as file:
        file.write("a good film\n")
    assert run(["predict", str(classifier), name, "--task", "sentiment", "--out", str(tmp_path / "out.jsonl")]) == 0
    (row,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert row["where"].endswith("caf\udce9.txt:1")


def test_a_tokenizer_may_say_more_than_the_model_reads(classifier, tmp_path, capsys):
    shutil.copytree(classifier, tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 512}))
    (tmp_path / "x.txt").write_text("a good film " * 100)
    assert run(["predict", str(tmp_path / "model"), str(tmp_path / "x.txt"), "--task", "sentiment"]) == 0


def test_predictions_before_a_full_disk_are_kept(tmp_path):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(Stopped, match=r"out\.jsonl cannot be written: File too large; the predictions before are in .*out\.jsonl\.part"):
            predict.write(({"where": f"x:{n}", "label": "good" * 10} for n in range(1000)), tmp_path / "out.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert json.loads((tmp_path / "out.jsonl.part").read_text().splitlines()[0])["where"] == "x:0"
    assert not (tmp_path / "out.jsonl").exists()
