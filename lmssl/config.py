"""Recipes: YAML plus `section.key=value` overrides -> typed dataclasses. Knows no component.

Any dataclass is a schema: `build(cls, mapping, where)` checks the keys (with a suggestion for a near miss), converts
each value to the field's annotation with pydantic, and calls the class, whose own `ValueError` becomes a refusal
that names the recipe key. lmssl's sections and objectives go through it; the trainer section, which is transformers' `TrainingArguments` with
fields of ours, through `lmssl.arguments.resolve`, with the same checks.
"""

import dataclasses
import importlib
import json
import os
import re
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from lmssl.errors import UserError, did_you_mean, said

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: `1e-4` is a number, `no`, `on`, `1:30` and `0100` are text, and a key that stands twice is refused."""


_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9]*|[1-9][0-9]{0,2}(?:_[0-9]{3})+|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)|[0-9]+\.[0-9]*)$|^[-+]?\.(?:inf|Inf)$|^\.(?:nan|NaN)$")
_REPLACED = {f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "timestamp", "value", "merge")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag not in _REPLACED] for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen: dict = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.MarkedYAMLError(problem=f'the key {key!r} is not text ("{key}" is)', problem_mark=key_node.start_mark)
        if key in seen:
            raise yaml.MarkedYAMLError(problem=f"the key '{key}' stands twice", problem_mark=key_node.start_mark)
        seen[key] = loader.construct_object(value_node, deep=True)
    return seen


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_yaml(text: str, where: str) -> Any:
    """One YAML document; `where` names it in errors."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader subclass
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        hint = "; text that begins with * needs quotes" if "alias" in f"{error.problem} {error.context}" else ""
        raise UserError(f"{where}{line}: not valid YAML: {error.problem or error.context}{hint}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid YAML: {said(error)}") from None


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = (), sections: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """A recipe file with its overrides applied: default < YAML < `section.key=value`.

    Args:
        path: the YAML file.
        overrides: `section.key=value`; the value is read as YAML, so `1e-4`, `[20, 100]` and `true` are typed.
        sections: the section names allowed.

    Raises:
        UserError: unreadable file, bad YAML, an unknown section, a section that is not a mapping, a bad override.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, not a recipe file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    recipe = parse_yaml(text, str(path))
    if not isinstance(recipe, dict):
        raise UserError(f"{path}: a recipe is a mapping with the sections {', '.join(sections)}")
    for name, section in recipe.items():
        _check_section(str(path), name, sections)
        if not isinstance(section, dict):
            raise UserError(f"{path}: {name}: expected a mapping of keys to values, got {section!r}")
    return apply_overrides(recipe, overrides, sections)


def of_folder(folder: str | Path) -> dict[str, Any]:
    """The recipe.yaml that a run left in its folder; empty where there is none, or another program's. `task` is among its sections where it was fine-tuned."""
    path = Path(folder) / "recipe.yaml"
    text = ""
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else "{}"
        found = parse_yaml(text, str(path))
    except UnicodeDecodeError:
        return {}
    except UserError:
        if re.search("^trainer:", text, re.MULTILINE):  # one of ours
            raise
        return {}
    ours = isinstance(found, dict) and found.keys() <= {"task", "data", "model", "objective", "trainer"} and all(isinstance(section, dict) for section in found.values())
    return found if ours else {}


def apply_overrides(recipe: dict[str, dict[str, Any]], overrides: typing.Iterable[str], sections: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """`section.key=value` (nested: `section.key.sub=value`) laid over a recipe; the input is not changed. What `section.key=null` means, `set_keys` says."""
    recipe = {name: dict(section) for name, section in recipe.items()}
    for item in overrides:
        key, equals, value = item.partition("=")
        path = key.split(".")
        if not equals or len(path) < 2 or not all(path):
            raise UserError(f"'{item}': an override reads section.key=value, for example trainer.max_steps=100")
        if not value:
            raise UserError(f"'{item}': an empty value; {key}=null takes the default, {key}='\"\"' is an empty text")
        _check_section(f"'{item}'", path[0], sections)
        target: dict = recipe.setdefault(path[0], {})
        for part in path[1:-1]:
            inner = target.get(part)
            target[part] = dict(inner) if isinstance(inner, dict) else {}
            target = target[part]
        found = value
        if value.strip() and not _is_text(value):
            found = parse_yaml(value, f"'{item}'")
            if found == value.strip():  # text, whose white space YAML drops: a cue begins with a space
                found = value
        if found is None and len(path) > 2:  # what is inside a value is nobody's to check
            target.pop(path[-1], None)
        else:
            target[path[-1]] = found
    return recipe


def _is_text(value: str) -> bool:
    """Whether an override means what it says, letter by letter, where YAML would read a comment (a headless table's column #1, a cue with a #), the
    name of something said before (*.jsonl), or the key of a mapping (a cue that ends with a colon)."""
    bare = value.strip()
    if bare[:1] in tuple("-?=,.<") and not (_INT.match(bare) or _FLOAT.match(bare)):  # signs of YAML's; a separator may be one
        return True
    return bare[:1] in tuple("#*&!%@`|>") or (bare[:1] not in tuple("[{'\"") and (" #" in bare or ": " in bare or bare.endswith(":")))


def _check_section(where: str, name: str, sections: tuple[str, ...]) -> None:
    if name not in sections:
        raise UserError(f"{where}: unknown section '{name}'; {did_you_mean(name, sections)}")


def check_keys(mapping: Mapping[str, Any], known: typing.Iterable[str], where: str) -> None:
    """Refuse a key that is not known, naming the nearest that is."""
    known = list(known)
    for key in mapping:
        if key not in known:
            raise UserError(f"{where}.{key}: unknown key; {did_you_mean(key, known)}")


def set_keys(mapping: Mapping[str, Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping without the keys that are null where their type does not admit nothing: they are as if they were not there."""
    admitted = {key for key, hint in hints.items() if type(None) in typing.get_args(hint) or hint in (Any, type(None))}
    return {key: value for key, value in mapping.items() if value is not None or key in admitted}


def convert(value: Any, annotation: Any, where: str) -> Any:
    """One value converted to one annotation, by pydantic's rules, except that true and false are never numbers, alone or in a list."""
    from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

    if isinstance(value, list | tuple):
        value = [os.fspath(part) if isinstance(part, os.PathLike) else part for part in value]
    elif isinstance(value, os.PathLike):
        value = os.fspath(value)
    elif hasattr(value, "columns"):  # pydantic would take its names for a list
        raise UserError(f"{where}: expected {describe(annotation)}, got a {type(value).__name__}; write it to a file and name that")
    if dataclasses.is_dataclass(annotation):  # of a plug-in: a mixture holds its parts
        if isinstance(value, annotation):  # type: ignore[arg-type]
            return value
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: expected a mapping of the fields of {describe(annotation)}, got {value!r:.200}")
        return build(annotation, value, where)  # type: ignore[arg-type]
    try:
        result = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        raise UserError(f"{where}: expected {describe(annotation)}, got {value!r:.200}") from error
    except PydanticUserError as error:
        raise UserError(f"{where}: a field of this type cannot be read from a recipe: {said(error)}") from error
    pairs = zip(value, result, strict=True) if isinstance(value, list) and isinstance(result, list) else [(value, result)]
    if any(isinstance(given, bool) and not isinstance(made, bool) and isinstance(made, int | float) for given, made in pairs):
        raise UserError(f"{where}: expected {describe(annotation)}, got {value!r}")
    return result


def describe(annotation: Any) -> str:
    """An annotation in words: `int | None` -> "whole number or nothing"."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "nothing", dict: "a mapping", list: "a list"}
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in words:
        return words[annotation]
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(a) for a in args))
    if origin in (list, tuple):
        return "a list of " + describe(args[0]) if args else "a list"
    return words.get(origin, getattr(annotation, "__name__", str(annotation)))


def chosen(section: Mapping[str, Any], choices: Mapping[str, Any], where: str) -> tuple[Any, dict[str, Any]]:
    """What a section's `name` means, one of `choices` or anybody's own `package.module:Name`, and the section's other keys.

    Raises:
        UserError: no name, one that means nothing, or a module that fails.
    """
    fields = dict(section)
    name = fields.pop("name", None)
    if not isinstance(name, str):
        raise UserError(f"{where}.name: {'missing' if name is None else f'expected a name, got {name!r}'}; {did_you_mean(name, choices)}")
    return (choices[name] if name in choices else _imported(name, choices, f"{where}.name")), fields


def check_code(section: Mapping[str, Any], choices: Mapping[str, Any], where: str, checkpoint: str, overrides: typing.Iterable[str]) -> None:
    """Refuse code that a checkpoint's recipe names (see `chosen`) and the caller does not: checkpoints are handed around.

    Args:
        section: of that recipe.
        where: the section's name.
        overrides: `section.key=value`, of the caller.
    """
    name = section.get("name")
    if not isinstance(name, str) or ":" not in name or name in choices or f"{where}.name={name}" in overrides:
        return
    if name.partition(":")[0] not in sys.modules:  # what is imported already runs nothing now
        raise UserError(f"{checkpoint}: its recipe.yaml asks for code outside of lmssl, '{name}'; if you trust it: {where}.name={name}")


def name_of(thing: Any, choices: Mapping[str, Any]) -> str:
    """The name by which `chosen` finds the class of a thing again."""
    own = type(thing)
    return next((name for name, cls in choices.items() if cls is own), f"{own.__module__}:{own.__qualname__}")


def _imported(name: str, choices: typing.Iterable[str], where: str) -> Any:
    """What `package.module:Name` means, from the working folder too."""
    module, colon, attribute = name.partition(":")
    if not colon:
        raise UserError(f"{where}: nothing is called '{name}'; {did_you_mean(name, choices)}, or your own: package.module:Class")
    if os.getcwd() not in sys.path:  # the command's own path begins in its folder, not in the user's
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever stands in it may fail
        raise UserError(f"{where}: '{name}' cannot be imported: {type(error).__name__}: {said(error)}") from error


def build(cls: type[T], mapping: Mapping[str, Any], where: str) -> T:
    """An instance of dataclass `cls` from a mapping of its field names.

    Raises:
        UserError: an unknown key, a missing one, a value of the wrong type, or the class's own `ValueError`,
            each prefixed with the recipe key.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    check_keys(mapping, fields, where)
    mapping = set_keys(mapping, hints)
    for name, f in fields.items():
        if name not in mapping and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}.{name}: missing, and it has no default")
    values = {name: convert(value, hints[name], f"{where}.{name}") for name, value in mapping.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would read as something else."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def _quoted(dumper: _Dumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if set(text) & set("\x85\u2028\u2029\ufeff") else None)


_Dumper.add_representer(str, _quoted)


def dump(recipe: Mapping[str, Any], ascii: bool = False) -> str:
    """YAML that `load` reads back to the same recipe; `ascii`: other letters are escaped."""
    return yaml.dump(json.loads(json.dumps(recipe)), Dumper=_Dumper, sort_keys=False, allow_unicode=not ascii, width=100)
