"""A slice of each reliability drill; `make drills` runs them whole, and the stock stack beside them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.drills.__main__ import modules

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def lines():
    """The JSON line of each drill, all run by one process."""
    command = [sys.executable, "-m", "tests.drills", "--slice"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    return {line["drill"]: line for line in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", [drill.name for drill in modules().values()])
def test_drill(name, lines):
    assert lines[name]["held"], lines[name]


def test_what_the_full_disk_is_made_to_hit_is_there():
    """The slice runs the first case alone."""
    from tests.drills.r04_disk_full import REACHED

    assert all(callable(getattr(owner(), name)) for owner, name in REACHED.values())


def test_the_page_shows_every_drill():
    text = (ROOT / "docs" / "reliability.md").read_text()
    assert [name for name in (d.name for d in modules().values()) if f"| {name} |" not in text] == []
