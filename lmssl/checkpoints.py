"""Checkpoints that are whole or not there: staged, hashed, synced, renamed, verified, rotated.

A save writes into a staging folder, then a manifest with the sha256 of every file, syncs files and folder to disk,
and only then renames the folder to `checkpoint-N`. A folder without a manifest, or whose files differ from it, never
counts as a checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lmssl.errors import UserError, did_you_mean, said

MANIFEST = "lmssl-manifest.json"
KEEP = 2
"""Verified checkpoints kept."""


class Damaged(Exception):
    """A checkpoint that must not be resumed from: the file and what is wrong with it."""


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file or folder to disk; a folder where its file system can."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some file systems of a network, whose folders are the server's to keep
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


def _signed(body: dict[str, Any]) -> str:
    """The manifest's text: the body, and the sha256 of the body's own text, which is laid out but once."""
    text = json.dumps(body, indent=1)
    return text[: -len("\n}")] + f',\n "sha256": "{hashlib.sha256(text.encode()).hexdigest()}"\n}}\n'


def write_signed(path: Path, body: dict[str, Any]) -> None:
    """A JSON file that carries its own sha256; whole, and on disk, or as it was before."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(_signed(body), encoding="utf-8")
    sync(beside)
    beside.replace(path)
    sync(path.parent)


def read_signed(path: Path) -> dict[str, Any]:
    """The body of a file that `write_signed` wrote.

    Raises:
        Damaged: missing, not JSON, or not what its sha256 says.
    """
    name = f"{path.parent.name}/{path.name}"
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
        body = {k: v for k, v in value.items() if k != "sha256"}
        signed = _signed(body)
    except FileNotFoundError:
        raise Damaged(f"{name} is missing: the save did not finish") from None
    except (ValueError, AttributeError, OSError) as error:
        raise Damaged(f"{name} cannot be read: {error}") from None
    if signed != text:
        raise Damaged(f"{name} differs from its own sha256")
    return body


@contextlib.contextmanager
def without_crc() -> Iterator[None]:
    """torch.save without its CRC-32, which takes longer than the writing; the manifest's sha256 says more."""
    from torch import serialization

    before = serialization.get_crc32_options()
    serialization.set_crc32_options(False)
    try:
        yield
    finally:
        serialization.set_crc32_options(before)


class Hashes:
    """The sha256 of the files of a staging folder, taken and synced while later ones are still being written."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(4, "lmssl-hash")  # a hash takes a core, a sync the disk; both leave the interpreter free
        self._found: dict[Path, tuple[Future[str], Future[None]]] = {}

    def begin(self, folder: Path, names: str = "*") -> None:
        """Start on files that are complete by now; those begun before are not begun again."""
        files = (p for p in folder.rglob(names) if p.is_file() and p.name != MANIFEST and p not in self._found)
        for path in sorted(files, key=lambda p: -p.stat().st_size):
            self._found[path] = self._pool.submit(sha256, path), self._pool.submit(sync, path)

    def finish(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Name relative to the folder -> bytes and sha256, every file synced."""
        self.begin(folder)
        try:
            hashed = {path: hashing.result() for path, (hashing, syncing) in self._found.items() if syncing.result() is None}
        finally:
            self._pool.shutdown(cancel_futures=True)
        return {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": value} for p, value in sorted(hashed.items())}


def seal(folder: Path, facts: dict[str, Any], hashes: Hashes | None = None) -> None:
    """Write the manifest of a finished folder, last of all, and force everything to disk.

    Args:
        folder: the staging folder, complete.
        facts: what a resume must know: step, identity of the run, tokens and seconds so far.
        hashes: those begun while the folder was being filled.
    """
    found = (hashes or Hashes()).finish(folder)
    for path in (p for p in folder.rglob("*") if p.is_dir()):
        sync(path)
    write_signed(folder / MANIFEST, {**facts, "files": found})


def publish(stage: Path, target: Path) -> None:
    """Rename a sealed folder to its final name; one that stands there already is moved aside first, then removed."""
    aside = target.with_name(f".old-{target.name}")
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
    stage.rename(target)
    sync(target.parent)
    remove(aside)


def remove(folder: Path) -> None:
    """Delete a checkpoint, its manifest first, so that a half-deleted one never verifies."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint.

    Raises:
        Damaged: no manifest, one of another step, a file missing, of another size or content, or weights that are
            not finite.
    """
    from safetensors import SafetensorError

    manifest = read_signed(folder / MANIFEST)
    if step_of(folder) not in (-1, manifest["step"]):
        raise Damaged(f"{folder.name}/{MANIFEST} is of step {manifest['step']}")
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{folder.name}/{name} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise Damaged(f"{folder.name}/{name} has {path.stat().st_size} bytes, expected {expected['bytes']}")
        try:
            if sha256(path) != expected["sha256"]:
                raise Damaged(f"{folder.name}/{name} differs from its sha256")
            if weight := _non_finite(path) if path.suffix == ".safetensors" else None:
                raise Damaged(f"{folder.name}/{name}: the weight {weight} is not finite")
        except (OSError, SafetensorError) as error:
            raise Damaged(f"{folder.name}/{name} cannot be read: {said(error)}") from error
    return manifest


def _non_finite(path: Path) -> str | None:
    import torch
    from safetensors import safe_open

    with safe_open(path, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a mapping
            value = tensors.get_tensor(name)
            if value.is_floating_point() and not torch.isfinite(value).all():
                return name
    return None


def step_of(folder: Path) -> int:
    """The N of checkpoint-N, -1 for any other name."""
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match else -1


def facts(folder: Path) -> dict[str, Any]:
    """What the manifest of a checkpoint says; nothing of one that lmssl did not write."""
    try:
        return read_signed(folder / MANIFEST)
    except Damaged:
        return {}


def all_of(root: Path) -> list[Path]:
    """Every checkpoint-N below a run's folder, newest first, whole or not."""
    found = [p for p in root.glob("checkpoint-*") if p.is_dir() and step_of(p) >= 0] if root.is_dir() else []
    return sorted(found, key=step_of, reverse=True)


def fits(folder: Path, shapes: Mapping[str, Sequence[int]], tied: Mapping[str, Collection[str]]) -> None:
    """Refuse weights that are not those of a model, all of them and no others.

    Args:
        shapes: of the model's tensors, by name.
        tied: for a name, all those that share its memory; one of them must be there.

    Raises:
        Damaged: a tensor missing, unknown, or of another shape.
    """
    from safetensors import safe_open

    found: dict[str, list[int]] = {}
    for name in sorted(read_signed(folder / MANIFEST)["files"]):
        if not name.endswith(".safetensors"):
            continue
        with safe_open(folder / name, "pt") as tensors:
            found |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118 - not a mapping
    for name in sorted(set(shapes) | set(found)):
        here = f"{folder.name}/model.safetensors: the weight {name}"
        if name not in found:
            if not found.keys() & set(tied.get(name, ())):
                raise Damaged(f"{here} is missing")
        elif name not in shapes:
            raise Damaged(f"{here} is none of the model's")
        elif list(shapes[name]) != list(found[name]):
            raise Damaged(f"{here} has shape {list(found[name])}, the model {list(shapes[name])}")


def newest(root: Path, check: Callable[[Path, dict[str, Any]], None] = lambda folder, manifest: None) -> tuple[Path | None, dict[str, Any], list[str]]:
    """The newest whole checkpoint, its manifest, and why each newer one was passed over.

    A damaged folder is kept, renamed to `damaged-checkpoint-N`, so that nothing ever resumes from it.

    Args:
        check: raises Damaged for a folder that is whole and still not to be resumed from.

    Raises:
        UserError: there are checkpoints and none is whole.
    """
    rejected: list[str] = []
    candidates = all_of(root)
    for folder in candidates:
        try:
            manifest = verify(folder)
            check(folder, manifest)
            return folder, manifest, rejected
        except Damaged as error:
            rejected.append(str(error))
    if candidates:
        raise UserError(f"{root}: no checkpoint is whole, so nothing can be resumed: {'; '.join(rejected)}; --overwrite starts again")
    return None, {}, rejected


def only(folder: Path, check: Callable[[Path, dict[str, Any]], None]) -> tuple[Path, dict[str, Any], list[str]]:
    """As `newest`, of a checkpoint that somebody chose.

    Raises:
        UserError: it is not whole, or not to be resumed from.
    """
    try:
        manifest = verify(folder)
        check(folder, manifest)
    except Damaged as error:
        raise UserError(f"{error}; resume_point() finds the newest whole one") from error
    return folder, manifest, []


def set_aside(root: Path, newer_than: int) -> None:
    """Move the damaged folders above a step out of the way, keeping them."""
    for folder in all_of(root):
        if step_of(folder) > newer_than:
            aside = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)


def rotate(root: Path, known_good: set[str]) -> None:
    """Remove all checkpoints older than the KEEP newest whole ones; what was verified before is not read again."""
    kept = 0
    for folder in all_of(root):
        if kept >= KEEP:
            remove(folder)
            known_good.discard(folder.name)
            continue
        try:
            if folder.name not in known_good:
                verify(folder)
                known_good.add(folder.name)
            kept += 1
        except Damaged:
            continue
    for leftover in (*root.glob(".old-checkpoint-*"), *root.glob(".staging-*")):
        remove(leftover)


def check_accepted(accept: Collection[str], known: Collection[str]) -> None:
    """Refuse `--accept KEY` of a key that no run is compared by."""
    for key in accept:
        if key not in known:
            raise UserError(f"--accept: nothing is called '{key}'; {did_you_mean(key, known)}")
