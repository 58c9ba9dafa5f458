"""The quick benches, one after the other, each line a JSON object on stdout; rewrites the table of docs/performance.md.

    python -m tests.bench [NAME ...]

With names (objectives, throughput, ...) it runs those alone and leaves the table as it is. The runs to a loss take hours:
tests/bench/time_to_loss.py. Nothing else may run on the machine meanwhile.
"""

import argparse
import json
import subprocess
import sys
from typing import Any

from tests.bench.common import ROOT
from tests.pages import machine, rewrite

PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- benches: written by `make bench` -->", "<!-- end of benches -->"
COMMANDS = {
    "objectives": ["tests.bench.objectives"],
    "throughput": ["tests.bench.throughput"],
    "memory": ["tests.bench.memory"],
    "preparation": ["tests.bench.preparation", "speed"],
    "startup": ["tests.bench.startup"],
    "reliability": ["tests.bench.reliability"],
}


def run(module: list[str]) -> list[dict[str, Any]]:
    """A bench in a process of its own; its JSON lines."""
    found = []
    with subprocess.Popen([sys.executable, "-m", *module], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("{"):
                print(line, end="", flush=True)
                found.append(json.loads(line) | {"command": f"python -m {' '.join(module)}"})
    if process.returncode:
        sys.exit(f"{' '.join(module)}: exit {process.returncode}")
    return found


def shown(value: Any) -> str:
    if isinstance(value, list):
        return f"{shown(value[0])} to {shown(value[-1])}" if len(value) == 2 else ", ".join(map(shown, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def table(lines: list[dict[str, Any]]) -> str:
    """Every line as a row: what was measured, its figures, the command that repeats it."""
    rows = ["| bench | figures | command |", "|---|---|---|"]
    for line in lines:
        figures = "; ".join(f"{key.replace('_', ' ')} {shown(value)}" for key, value in line.items() if key not in ("bench", "command"))
        rows.append(f"| {line['bench']} | {figures} | `{line['command']}` |")
    return f"{machine()}:\n\n" + "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *COMMANDS], metavar="NAME", help=", ".join(COMMANDS))
    names = parser.parse_args().names
    lines = [line for name in names or COMMANDS for line in run(COMMANDS[name])]
    if not names:
        rewrite(PAGE, BEGIN, END, table(lines))


if __name__ == "__main__":
    main()
