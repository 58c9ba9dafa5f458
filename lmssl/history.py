"""What a checkpoint has read: whether its text is still what it was, and which test texts it has seen."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

from lmssl import checkpoints, config, output, tokenization
from lmssl.data.contamination import SHORTEST, leaked, searchable
from lmssl.data.tokens import TokenSet
from lmssl.errors import UserError
from lmssl.recipe import DataSection, prepared
from lmssl.tokenization import Tokenizer


def leak_check(source: str, test: typing.Sequence[Any]) -> dict[str, Any]:
    """How many test examples share 13 words in a row with what the backbone was pretrained on, and the checkpoints that it was continued from.

    Returns:
        {"checked": True, "test_examples", "leaked", "examples": where the first few stand, "short": of which no text is long enough to be looked for}; or
        {"checked": False, "reason"}, also where all are too short.
    """
    owners = [k for k, example in enumerate(test) for _ in example.texts()]
    found, seen = set[int](), set[Path]()
    folder: str | None = source
    while folder is not None:
        try:
            if Path(folder).resolve() in seen:
                raise UserError(f"{folder} was continued from what has been replaced since")
            seen.add(Path(folder).resolve())
            token_set, tokenizer, before = _pretraining_text(folder)
        except UserError as error:
            known = f"; of the text since then {len(found):,} of {len(test):,} test examples" if folder != source else ""
            return {"checked": False, "reason": f"{error}{known}"}
        # The documents come out of the tokenizer again, perhaps in lower case; so must the test texts.
        texts = tokenizer.round_trip([text for example in test for text in example.texts()])
        found |= {owners[i] for i in leaked(texts, token_set.texts())}
        folder = before
    short = sum(not any(map(searchable, example.texts())) for example in test)
    if short == len(test):
        return {"checked": False, "reason": f"every test example has fewer than {SHORTEST} words, too few to be told from chance"}
    return {"checked": True, "test_examples": len(test), "leaked": len(found), "examples": [test[k].where for k in sorted(found)[:20]], "short": short}


def _pretraining_text(checkpoint: str) -> tuple[TokenSet, Tokenizer, str | None]:
    """What a checkpoint was pretrained on, its tokenizer, and the checkpoint that it was continued from.

    Raises:
        UserError: its text is not known, not at hand, or no longer what it was.
    """
    recipe = config.of_folder(checkpoint)
    if not recipe:
        raise UserError(f"{checkpoint} has no recipe.yaml of lmssl, so its text is not known")
    if "task" in recipe:
        raise UserError(f"{checkpoint} was fine-tuned, and what it has seen since its pretraining is not known")
    try:
        tokenizer = tokenization.load(checkpoint)
        found = prepared(config.build(DataSection, recipe.get("data", {}), "data"), tokenizer, quiet=True)
    except UserError as error:
        raise UserError(f"the pretraining text of {checkpoint} is not at hand: {error}") from None
    # The same text, but cleaned by an older rule: what has leaked may no longer be in it.
    other_tokens = (_of_text(checkpoint) or {}).get("tokens", found.identity["tokens"]) != found.identity["tokens"]
    if has_changed(checkpoint, found) or other_tokens or _recorded(checkpoint, "earlier_data"):
        raise UserError(f"the pretraining text of {checkpoint} has changed since, or was another before the run was resumed")
    return found, tokenizer, recipe.get("model", {}).get("from")


def has_changed(checkpoint: str, found: TokenSet) -> bool:
    """Whether the text that a checkpoint's recipe names is another than the one it was trained on, as far as its metrics.json or its manifest knows."""
    then = _of_text(checkpoint)
    return then is not None and then["data"] != found.identity["data"]


def _of_text(checkpoint: str) -> dict[str, Any] | None:
    """What a checkpoint knows of the text that it was trained on, as `TokenSet.identity`."""
    return _recorded(checkpoint, "data") or _recorded(checkpoint, "identity")


def _recorded(checkpoint: str, key: str) -> Any:
    """What metrics.json of a finished run says, or the manifest of a checkpoint along the way."""
    return (output.read_json(Path(checkpoint) / "metrics.json") or {}).get(key) or checkpoints.facts(Path(checkpoint)).get(key)
