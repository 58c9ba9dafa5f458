"""A slice of each drill; `make drills` runs them whole."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_one_kill_and_resume():
    command = [sys.executable, "-m", "tests.drills.resume", "--kills", "1", "--steps", "60", "--kinds", "masked"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["held"] is True
