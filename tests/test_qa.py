"""Answers: windows lose none, offsets are right for every tokenizer, metrics follow the definition to the digit."""

import gzip
import json
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from lmssl.data import corpus
from lmssl.errors import UserError
from lmssl.objectives.cross_entropy import token_loss
from lmssl.predict import examples
from lmssl.tasks import squad
from lmssl.tasks.base import Backbone, Few
from lmssl.tasks.qa import Question, QuestionAnswering
from lmssl.trainer import ExactTrainer
from tests.helpers import apart, arguments, first_step, saved_backbone, sentences, token_set, tokenizer

ARCHITECTURES = ["gpt2", "llama", "bert", "roberta", "modernbert", "t5", "bart"]


def question(n, text, begin, end, asked="how was the film"):
    return Question(text, "", f"x:{n}", asked, f"q{n}", ((text[begin:end], begin),))


def word_questions(count, seed=0, longest=3):
    """Questions whose answers are whole words anywhere in contexts of up to 200 words."""
    draw, made = random.Random(seed), []
    for n in range(count):
        text = " ".join(sentences(draw.randint(1, 4), seed=n + 1000 * seed))
        words = [m.span() for m in re.finditer(r"\w+", text)]
        first = draw.randrange(len(words))
        last = min(len(words) - 1, first + draw.randrange(longest))
        made.append(question(n, text, words[first][0], words[last][1]))
    return made


@pytest.fixture(scope="module")
def folder_of(shared_dir, tmp_path_factory):
    tokens, made = token_set(shared_dir), {}
    for architecture in ARCHITECTURES:
        made[architecture] = tmp_path_factory.mktemp(architecture)
        saved_backbone(architecture, tokens, made[architecture], 64)
    return made


@pytest.mark.parametrize("family", ["encoder", "decoder"])
@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_every_gold_answer_survives_the_windows(kind, family, folder_of):
    """It stands wholly in a window, is inside what may be chosen, and its tokens spell it exactly."""
    made = tokenizer(kind)
    backbone = replace(Backbone.load(str(folder_of["bert"])), family=family, tokenizer=made, length=48)
    some, task = word_questions(300), QuestionAnswering(stride=16)
    overlapping = 0
    for example, windows in zip(some, task.windows(backbone, some), strict=True):
        held = [w for w in windows if w.answer != (w.null, w.null)]
        overlapping += len(windows) > 1
        assert held, example
        for w in held:
            assert len(w.ids) <= 48
            assert w.allowed()[list(w.answer)].all()
            assert w.exact
            begin, end = w.spans[w.answer[0] - w.first, 0], w.spans[w.answer[1] - w.first, 1]
            assert example.text[begin:end] == example.answers[0][0]
            start, stop = np.zeros(len(w.ids)), np.zeros(len(w.ids))
            start[w.answer[0]] = stop[w.answer[1]] = 9.0
            (best, *_), _ = squad.candidates(w, start, stop, 5, 30)
            assert example.text[best.begin : best.end] == example.answers[0][0]
        assert all(w.null == (len(w.ids) - 1 if family == "decoder" else 0) for w in windows)
        covered = np.zeros(len(example.text), bool)
        for w in windows:
            for a, b in w.spans:
                covered[a:b] = True
        assert all(c.isspace() for c, inside in zip(example.text, covered, strict=True) if not inside), "no context token is left out"
    assert overlapping > 50


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_answers_inside_a_token_take_the_smallest_cover(kind, folder_of):
    made, text = tokenizer(kind), "the quite strong ending was warm. Überraschung 日本語 naïve 5km"
    backbone, task = replace(Backbone.load(str(folder_of["bert"])), tokenizer=made), QuestionAnswering()
    for begin in range(len(text)):
        for end in range(begin + 1, min(begin + 9, len(text)) + 1):
            if text[begin].isspace() or text[end - 1].isspace():
                continue
            ((window,),) = task.windows(backbone, [question(0, text, begin, end)])
            a, b = (window.spans[p - window.first] for p in window.answer)
            assert a[0] <= begin
            assert end <= b[1]
            assert window.exact == ((a[0], b[1]) == (begin, end))
            assert window.answer[0] == window.answer[1] or (a[1] > begin and b[0] < end), "no smaller cover"
    inside = [question(0, text, 5, 8), question(1, text, 4, 9)]
    assert task.notes(backbone, inside)["answers"] == 2
    assert task.notes(backbone, inside)["answers_inside_a_token"] in (0, 1)


def official(guess, golds, version):
    """The published definition, written a second time: bags of normalised words, the best over the answers."""

    def words(text):
        text = "".join(c for c in text.lower() if c not in set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"))
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    if version == 2:
        golds = [g for g in golds if words(g)] or [""]
    exact = max(int(words(guess) == words(g)) for g in golds)
    best = 0.0
    for gold in golds:
        left, common = list(words(gold)), 0
        for word in words(guess):
            if word in left:
                left.remove(word)
                common += 1
        if version == 2 and (not words(gold) or not words(guess)):
            best = max(best, float(words(gold) == words(guess)))
        elif common:
            precision, recall = common / len(words(guess)), common / len(words(gold))
            best = max(best, 2 * precision * recall / (precision + recall))
    return exact, best


@pytest.mark.parametrize("version", [1, 2])
def test_metrics_follow_the_definition(version):
    """500 guesses: right, partly right, empty, unanswerable, several answers, articles and punctuation alone."""
    draw = random.Random(version)
    pool = ["the", "a", "An", "old", "film,", "U.S.", "story", "--", "of", "1994", "naïve", "The film"]
    guesses, golds = [], []
    for _ in range(500):
        some = [" ".join(draw.choices(pool, k=draw.randint(1, 5))) for _ in range(draw.randint(1, 4))]
        golds.append([] if version == 2 and draw.random() < 0.3 else some)
        guesses.append(draw.choice(["", some[0], some[-1].upper(), " ".join(draw.choices(pool, k=3)), "the", f"{some[0]} more"]))
    expected = [official(g, some or [""], version) for g, some in zip(guesses, golds, strict=True)]
    found = squad.scores(guesses, golds)
    assert found["exact_match"] == pytest.approx(np.mean([e for e, _ in expected]), abs=1e-12)
    assert found["f1"] == pytest.approx(np.mean([f for _, f in expected]), abs=1e-12)
    assert ("f1_unanswerable" in found) == (version == 2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_the_models_own_loss(architecture, folder_of):
    """Where every position is allowed and nothing padded, the model's own start and end loss is the same number."""
    backbone, task = Backbone.load(str(folder_of[architecture]), 64), QuestionAnswering()
    model = task.model(backbone, True, 0).eval()
    item = task.encode(backbone, word_questions(1))[0][0]
    ids = torch.tensor(item["input_ids"]).long()[None]
    with torch.no_grad():
        theirs = model(input_ids=ids, start_positions=torch.tensor([item["labels"][0]]), end_positions=torch.tensor([item["labels"][1]])).loss
        ours = token_loss(model(input_ids=ids, allowed=torch.ones_like(ids).bool()), torch.tensor([item["labels"]]))
    assert ours.item() == pytest.approx(theirs.item(), rel=2e-6)


@pytest.mark.parametrize("architecture", ["llama", "modernbert", "t5"])
def test_split_of_the_batch_changes_nothing(architecture, folder_of, tmp_path):
    backbone, task, steps = Backbone.load(str(folder_of[architecture]), 64), QuestionAnswering(), []
    items = [item for some in task.encode(backbone, word_questions(12)) for item in some]
    for micro, accumulate in [(8, 1), (4, 2), (1, 8)]:
        args = arguments(tmp_path, max_steps=1, per_device_train_batch_size=micro, gradient_accumulation_steps=accumulate, max_grad_norm=0.0)
        steps.append(first_step(ExactTrainer(task.model(backbone, True, 0), args, Few(items, [""] * len(items), 3, 8), task.collator(backbone, 8), quiet=True)))
    for loss, grad in steps[1:]:
        assert abs(loss - steps[0][0]) / steps[0][0] < 1e-6
        assert apart(grad, steps[0][1]) < 1e-6


def test_n_best_holds_valid_spans_alone(folder_of):
    backbone, task = Backbone.load(str(folder_of["bert"]), 48), QuestionAnswering(stride=8, n_best=7, longest=4)
    some = word_questions(20, seed=3)
    model = task.model(backbone, True, 0)
    for example, (spans, null) in zip(some, task.n_best_of(model, backbone, some, 4), strict=True):
        assert 0 < len(spans) <= 7
        assert len({(s.begin, s.end) for s in spans}) == len(spans)
        assert [s.score for s in spans] == sorted((s.score for s in spans), reverse=True)
        assert all(0 <= s.begin < s.end <= len(example.text) for s in spans)
        assert np.isfinite(null)
    alone = [task.predict(model, backbone, [e], 1)[0] for e in some]
    assert task.predict(model, backbone, some, 8) == alone


def test_an_answer_is_as_long_as_asked_at_most():
    window = squad.Window(np.arange(8), 1, np.array([[3 * k, 3 * k + 2] for k in range(6)]), 0, (0, 0), True)
    start, end = np.full(8, -9.0), np.full(8, -9.0)
    start[2], end[4] = 9.0, 9.0  # three tokens
    for longest, best in ((3, (3, 11)), (2, None)):
        spans, _ = squad.candidates(window, start, end, 50, longest)
        assert max(s.end - s.begin for s in spans) == 3 * longest - 1
        assert ((spans[0].begin, spans[0].end) == best) == (best is not None)


def test_no_answer():
    task = QuestionAnswering(no_answer=True, null_margin=1.0)
    spans = [squad.Span(0, 4, 2.0)]
    assert task.choose("good film", spans, 3.5) == ""
    assert task.choose("good film", spans, 2.5) == "good"
    assert QuestionAnswering(no_answer=False).choose("good film", spans, 9.0) == "good"
    assert task.choose("", [], 0.0) == ""
    answered = question(0, "good film", 0, 4)
    unanswered = Question("x", "", "")
    assert QuestionAnswering().fitted([answered], [answered, unanswered]).no_answer is False, "the test set decides nothing"
    assert QuestionAnswering().fitted([answered, unanswered], [answered]).no_answer is True
    assert (task.majority([answered, unanswered] * 2), QuestionAnswering(no_answer=False).majority([answered])) == (0.5, 0.0)


def test_written_answers(folder_of):
    """An architecture without a head, or `answer: text`, writes."""
    task = QuestionAnswering(answer="text", beams=1)
    for architecture in ("gpt2", "t5"):
        backbone = Backbone.load(str(folder_of[architecture]), 64)
        some = [question(n, text, len(text) - 4, len(text)) for n, text in enumerate(["a film that is good", "it was dull", "and so long"])]
        end = task.separator if architecture == "gpt2" else "</s>"
        for (item,), asked in zip(task.encode(backbone, some), some, strict=True):
            shown, target = (backbone.tokenizer.decode(item[name]) for name in ("input_ids", "target"))
            assert shown == f"<s>{asked.question}{task.separator}{asked.text}{end}"
            assert target == f"{asked.answers[0][0]}</s>"
        scores, guesses = task.evaluate(task.model(backbone, True, 0), backbone, some, 2)
        assert set(scores) == {"exact_match", "f1"}
        assert len(guesses) == 3


RECORD = {"id": "1", "context": "the film was good", "question": "how was it", "answers": {"text": ["good"], "answer_start": [13]}}


def test_formats(tmp_path):
    """Flat JSONL, CSV with JSON inside, SQuAD JSON (2.0, gzip): one reading."""
    (tmp_path / "a.jsonl").write_text(json.dumps(RECORD) + "\n")
    quoted = json.dumps(RECORD["answers"]).replace('"', '""')
    (tmp_path / "b.csv").write_text(f'id,context,question,answers\n1,the film was good,how was it,"{quoted}"\n')
    qas = [{"id": "1", "question": "how was it", "answers": [{"text": "good", "answer_start": 13}]}, {"id": "2", "question": "who made it", "answers": [], "is_impossible": True}]
    whole = {"version": "2.0", "data": [{"title": "t", "paragraphs": [{"context": RECORD["context"], "qas": qas}]}]}
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(json.dumps(whole).encode()))
    task = QuestionAnswering()
    a, b, c = (task.read(corpus.resolve(str(tmp_path / name))) for name in ("a.jsonl", "b.csv", "c.json.gz"))
    assert a[0].answers == b[0].answers == c[0].answers == (("good", 13),)
    assert c[1].answers == ()
    assert (c[1].id, c[1].where) == ("2", f"{tmp_path}/c.json.gz:data[0].paragraphs[0].qas[1]")
    assert [e.question for e in examples(task, [str(tmp_path / "a.jsonl")])] == ["how was it"]


@pytest.mark.parametrize(("said", "answered"), [("False", True), ("false", True), (0, True), (None, True), ("True", False), (1, False), (True, False)])
def test_is_impossible_may_be_text(said, answered, tmp_path):
    """A table writes it as text, and the text "False" is true."""
    (tmp_path / "x.jsonl").write_text(json.dumps(RECORD | {"is_impossible": said}) + "\n")
    (made,) = QuestionAnswering().read(corpus.resolve(str(tmp_path / "x.jsonl")))
    assert bool(made.answers) == answered


def test_a_question_that_stands_twice_counts_once(tmp_path):
    (tmp_path / "x.jsonl").write_text((json.dumps(RECORD) + "\n") * 2 + json.dumps(RECORD | {"question": "another"}) + "\n")
    assert [e.where.rpartition(":")[2] for e in QuestionAnswering(id="nothing").read(corpus.resolve(str(tmp_path / "x.jsonl")))] == ["1", "3"]
    (tmp_path / "y.jsonl").write_text("".join(json.dumps(RECORD | {"id": "q", "question": q}) + "\n" for q in ("one", "two")))
    with pytest.raises(UserError, match=r"y.jsonl:2: the id 'q' is that of another question, at .*y.jsonl:1"):
        QuestionAnswering().read(corpus.resolve(str(tmp_path / "y.jsonl")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": {"text": ["good"], "answer_start": [12]}}, r":1: the answer 'good' does not stand at character 12 of 'context': there is ' goo'"),
        ({"answers": {"text": ["good"], "answer_start": ["13"]}}, "expected text at a character number"),
        ({"answers": {"text": ["good"], "answer_start": []}}, "of one length"),
        ({"answers": 7}, 'expected {"text": \\["Ada"\\]'),
        ({"answers": "good"}, "not JSON"),
        ({"question": ""}, "column 'question' holds ''"),
        ({"context": None}, "column 'context' holds None"),
        ({"is_impossible": "perhaps"}, "column 'is_impossible' holds 'perhaps'"),
    ],
)
def test_bad_records(change, message, tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(RECORD | change) + "\n")
    with pytest.raises(UserError, match=message):
        QuestionAnswering().read(corpus.resolve(str(tmp_path / "x.jsonl")))


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[3]", "expected a JSON object"), ('{"data": [{}]}', "nor SQuAD JSON"), ('{"data": 3}', "nor SQuAD JSON")])
def test_bad_squad_files(text, message, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=message):
        QuestionAnswering().read(corpus.resolve(str(tmp_path / "x.json")))


def test_no_answer_is_as_likely_as_in_the_window_that_speaks_most_against_it():
    spans, null = squad.best([([], 3.0), ([squad.Span(0, 4, 2.0), squad.Span(0, 4, 1.0)], -1.0)], 5)
    assert ([s.score for s in spans], null) == ([2.0], -1.0)


def test_scores_by_kind_of_question():
    found = squad.scores(["Ada", "Ada", ""], [["Ada"], [], []])
    assert (found["exact_match_answerable"], found["exact_match_unanswerable"]) == (1.0, 0.5)
    assert (found["f1_answerable"], found["f1_unanswerable"]) == (1.0, 0.5)


@pytest.mark.parametrize(
    "record",
    [
        {"answers": None},
        {"answers": []},
        {"answers": ""},
        {"answers": {"text": [], "answer_start": []}},
        {"is_impossible": True},
        {"answers": "", "is_impossible": "True"},
        {"answers": {"text": ["film"], "answer_start": [4]}, "is_impossible": True},
    ],
)
def test_none_is_no_answer(record, tmp_path):
    plain = {"context": "the film was good", "id": None}
    rows = [{**plain, "question": "how", **record}, {**plain, "question": "what", "answers": {"text": ["film"], "answer_start": [4]}}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = QuestionAnswering().read(corpus.resolve(str(tmp_path / "x.jsonl")))
    assert (first.answers, second.answers) == ((), (("film", 4),))
    assert first.id != second.id, "without an id it is called by where it stands"


def test_a_question_that_stands_twice_has_the_answers_of_both(tmp_path, caplog):
    rows = [
        {"context": "the film was good", "question": "what", "id": str(n), "answers": {"text": [text], "answer_start": [at]}}
        for n, (text, at) in enumerate([("film", 4), ("the film", 0), ("film", 4)])
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level("INFO", "lmssl"):
        (one,) = QuestionAnswering().read(corpus.resolve(str(tmp_path / "x.jsonl")))
    assert (one.id, one.answers) == ("0", (("film", 4), ("the film", 0)))
    assert "2 questions that stand twice" in caplog.text


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_question_that_stands_twice_has_the_answers_of_both_in_either_order(order, tmp_path):
    rows = [
        {"id": "a", "question": "who?", "context": "Ada wrote it", "answers": {"text": ["Ada"], "answer_start": [0]}},
        {"id": "b", "question": "who?", "context": "Ada wrote it", "answers": None},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(rows[k]) + "\n" for k in order))
    (found,) = QuestionAnswering().read(corpus.resolve(str(tmp_path / "rows.jsonl"), "x"))
    assert found.answers == (("Ada", 0),)
