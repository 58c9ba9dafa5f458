"""What `lmssl show` prints of a row, sign by sign."""

import io
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

import lmssl
from lmssl import display
from lmssl.data.stream import Stream
from lmssl.objectives.base import IGNORE, SameLength

TEXT = "the film was good and the cast too"


@dataclass(frozen=True)
class Chosen(SameLength):
    """A word of each fate: masked, replaced by the word before it, left as it is."""

    families: ClassVar = frozenset({"encoder"})
    needs: ClassVar = frozenset({"mask"})

    def __call__(self, row, vocab, rng):
        ids, labels = row.ids.copy(), np.full(len(row.ids), IGNORE)
        words = np.flatnonzero(vocab.word_start[ids])
        masked, replaced, kept = words[1], words[3], words[5]
        labels[[masked, replaced, kept]] = ids[[masked, replaced, kept]]
        ids[masked], ids[replaced] = vocab.mask, row.ids[words[4]]
        return {"input_ids": ids, "labels": labels, "segments": row.segments}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """Every word is a token of its own."""
    own = lmssl.tokenization.train([TEXT] * 50, "wordpiece", 400)
    return lmssl.from_iterable([TEXT, "another text"], own, tmp_path_factory.mktemp("t") / "tokens", held_out=["another text"])


def shown(tokens, objective, colour):
    return display.row(Stream(tokens, objective, 16, 0, 1), tokens.tokenizer, 0, colour).splitlines()


def test_what_happened_to_each_token(tokens):
    head, text, row, labels = shown(tokens, Chosen(), False)
    count = len(tokens.tokenizer.encode([TEXT])[0])
    assert head == f"item 0 (epoch 0, row 0): 1 documents, {count} tokens"
    bos, eos, mask = (tokens.tokenizer.roles[role] for role in ("bos", "eos", "mask"))
    assert (text.split(), row.split()) == (["text", *f"{bos}{TEXT}{eos}".split()], ["input", *f"{bos}the[{mask}] was{{ and}} and( the) cast too{eos}".split()])
    assert labels == f"  3 labels, {3 / count:.1%} of the tokens"


def test_colours_say_what_brackets_say(tokens):
    row = shown(tokens, Chosen(), True)[2]
    for word, kind in ((tokens.tokenizer.roles["mask"], "mask"), (" and", "random"), (" the", "kept"), (tokens.tokenizer.roles["eos"], "special")):
        assert f"\x1b[{display.STYLES[kind]}m{word}\x1b[0m" in row
    assert not set("[{(") & set(row.replace("\x1b[", "").replace(tokens.tokenizer.roles["mask"], ""))
    assert display.legend(False) == "[masked]  {replaced at random}  (asked, left as it is)  sentinel  special token"
    assert display.legend(True).count("\x1b[0m") == 5


def test_what_is_asked_of_every_token_is_plain(tokens):
    _, text, row, _ = shown(tokens, lmssl.NextToken(), False)
    assert row.replace("input", "text ") == text
    assert not set("[{(") & set(row)


@pytest.mark.parametrize("objective", [lmssl.SpanCorruption(rate=0.5, mean_span=2.0), lmssl.Infilling()], ids=["spans", "infilling"])
def test_a_target_stands_below_its_input(objective, tokens):
    _, _, row, target, _ = shown(tokens, objective, False)
    assert target.split()[0] == "target"
    if isinstance(objective, lmssl.SpanCorruption):
        assert "<extra_id_0>" in row
        assert "<extra_id_0>" in target
        words = [w for line in (row, target) for w in line.replace("<", " <").replace(">", "> ").split() if w in TEXT.split()]
        assert sorted(words) == sorted(TEXT.split()), "each word once, in one of the two"


def test_text_does_not_turn_the_terminal_around():
    assert display._visible("a\u202eb\u2067c\x1b") == "a\\u202eb\\u2067c\\x1b"
    assert display._visible("\U0001f469\u200d\U0001f4bb") == "\U0001f469\u200d\U0001f4bb", "what joins an emoji is part of it"


@pytest.mark.parametrize(("environment", "terminal", "colour"), [({}, True, True), ({}, False, False), ({"NO_COLOR": "1"}, True, False), ({"FORCE_COLOR": "1"}, False, True)])
def test_colour_is_for_terminals(environment, terminal, colour, monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    assert display.wants_colour(stream) == colour
