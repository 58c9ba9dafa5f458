"""The objectives by recipe name. Anybody's own: `package.module:Class`."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from lmssl.config import build, chosen, name_of
from lmssl.errors import UserError
from lmssl.objectives.base import Objective
from lmssl.objectives.denoising import Infilling, SpanCorruption
from lmssl.objectives.masked import MaskedTokens
from lmssl.objectives.next_token import NextToken

OBJECTIVES: dict[str, type] = {
    "next_token": NextToken,
    "masked": MaskedTokens,
    "span_corruption": SpanCorruption,
    "infilling": Infilling,
}

MEMBERS = ("families", "needs", "row_length", "lengths", "most_labels", "held_out")
"""What an objective has beside its fields."""


def make(section: Mapping[str, Any], where: str = "objective") -> Objective:
    """The objective of a recipe section: `{name: masked, rate: 0.3}`.

    Raises:
        UserError: no name, an unknown name or field, a value out of range, or a plug-in that cannot be imported.
    """
    cls, fields = chosen(section, OBJECTIVES, where)
    if section["name"] not in OBJECTIVES:
        _check(cls, section["name"], f"{where}.name")
    return build(cls, fields, where)


def fields_of(objective: Objective) -> dict[str, Any]:
    """The recipe section that makes this objective again."""
    return {"name": name_of(objective, OBJECTIVES), **dataclasses.asdict(objective)}  # type: ignore[call-overload]


def _check(cls: Any, name: str, where: str) -> None:
    """Refuse what is no objective, naming what it lacks."""
    missing = [member for member in MEMBERS if not hasattr(cls, member)]
    if isinstance(cls, type) and not any("__call__" in base.__dict__ for base in cls.__mro__):
        missing.append("__call__")
    needs: Any = getattr(cls, "needs", frozenset())
    unknown = [repr(need) for need in needs if need not in ("mask", "sentinels")] if isinstance(needs, Collection) and not isinstance(needs, str) else [repr(needs)]
    if unknown:
        raise UserError(f"{where}: '{name}' needs {min(unknown)}; a set of 'mask' and 'sentinels', which a tokenizer may have")
    if not (dataclasses.is_dataclass(cls) and isinstance(cls, type)) or missing:
        raise UserError(f"{where}: '{name}' is not an objective: a frozen dataclass with {', '.join(MEMBERS)} and __call__ ({', '.join(missing) or 'a dataclass'} is missing)")
