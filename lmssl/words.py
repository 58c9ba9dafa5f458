"""What a word is, and where a sentence ends, in any script."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import regex

_SPACELESS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
"""Scripts that put no space between words."""
_WORD_OF_ASCII = re.compile(r"\w+")
_LETTER = rf"[[{_SPACELESS}]&&[\w--\p{{M}}]]"
_WORD = regex.compile(rf"(?V1){_LETTER}\p{{M}}*|[\w--[{_SPACELESS}]]+")
_SPACELESS_LETTER = regex.compile(f"(?V1){_LETTER}")
_SENTENCE_END = regex.compile(r"[\p{Sentence_Terminal}…][\p{Pe}\p{Pf}\"']*\s*\Z")


def words(text: str) -> list[str]:
    """Lower-case words without punctuation, however the text composes its accents; where a script has no spaces, its characters.

    >>> words("It's five: Ça va?"), words("東京, हिन्दी! ក។")
    (['it', 's', 'five', 'ça', 'va'], ['東', '京', 'हिन्दी', 'ក'])
    """
    text = text.lower()
    return _WORD_OF_ASCII.findall(text) if text.isascii() else _WORD.findall(unicodedata.normalize("NFC", text))


def spaceless(text: str) -> bool:
    """Whether a text begins with a character of a script without spaces, of which each is taken for a word.

    >>> spaceless("東京"), spaceless("Tokyo"), spaceless("")
    (True, False, False)
    """
    return _SPACELESS_LETTER.match(text) is not None


def has_spaceless(text: str) -> bool:
    """Whether a text holds characters of a script without spaces.

    >>> has_spaceless("In 東京"), has_spaceless("In Tokyo")
    (True, False)
    """
    return not text.isascii() and _SPACELESS_LETTER.search(text) is not None


def mostly_spaceless(texts: Sequence[str]) -> bool:
    """Whether most letters of some texts are of a script without spaces.

    >>> mostly_spaceless(["東京", "京都は", "Tokyo"]), mostly_spaceless(["I live in 東京 now"])
    (False, False)
    >>> mostly_spaceless(["東京は大きい", "Tokyo"])
    True
    """
    without = sum(len(_SPACELESS_LETTER.findall(text)) for text in texts if has_spaceless(text))
    return 2 * without > sum(c.isalpha() for text in texts for c in text)


def spaced(text: str) -> str:
    """A text with a space around each character of a script without them.

    >>> spaced("in 東京").split(), spaced("in Tokyo")
    (['in', '東', '京'], 'in Tokyo')
    """
    return _SPACELESS_LETTER.sub(r" \g<0> ", text) if has_spaceless(text) else text


def punctuation(text: str) -> bool:
    """Whether a text begins with punctuation or a symbol; a part of a letter, decoded as U+FFFD, is neither."""
    return text[:1] not in ("", "\ufffd") and unicodedata.category(text[0])[0] in "PS"


def ends_sentence(text: str) -> bool:
    """Whether a text ends as a sentence does, closing quotes and brackets behind it or not.

    >>> [ends_sentence(text) for text in ("He said so.”", "So.\\n\\n", "東京。", "है।", "so,")]
    [True, True, True, True, False]
    """
    return _SENTENCE_END.search(text) is not None
