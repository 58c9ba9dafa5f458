"""The quick benches, one after the other, each line a JSON object on stdout; rewrites the table of docs/performance.md.

    python -m tests.bench [NAME ...]

With names (objectives, throughput, ...) it runs those alone and rewrites their rows. The runs to a loss take hours:
tests/bench/time_to_loss.py. Nothing else may run on the machine meanwhile.
"""

import argparse
import datetime
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
    "best": ["tests.bench.throughput", "next_token", "masked", "--best-stock"],
    "large": ["tests.bench.throughput", "next_token", "--shape", "large"],
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
            if line.startswith('{"'):
                print(line, end="", flush=True)
                found.append(json.loads(line) | {"command": f"python -m {' '.join(module)}"})
    if process.returncode:
        sys.exit(f"{' '.join(module)}: exit {process.returncode}")
    return found


def shown(value: Any) -> str:
    if isinstance(value, list):
        return f"{shown(value[0])} to {shown(value[-1])}" if len(value) == 2 else ", ".join(map(shown, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def rows_of(lines: list[dict[str, Any]]) -> list[str]:
    """Every line as a row: what was measured, its figures, when, and the command that repeats it."""
    today, rows = datetime.date.today().isoformat(), []
    for line in lines:
        figures = "; ".join(f"{key.replace('_', ' ')} {shown(value)}" for key, value in line.items() if key not in ("bench", "command"))
        rows.append(f"| {line['bench']} | {figures} | {today} | `{line['command']}` |")
    return rows


def kept(commands: set[str]) -> list[str]:
    """The rows of the page that other commands gave."""
    text = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| bench")]
    return [row for row in rows if row.rsplit("`", 2)[1] not in commands]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *COMMANDS], metavar="NAME", help=", ".join(COMMANDS))
    names = parser.parse_args().names or list(COMMANDS)
    commands = [f"python -m {' '.join(module)}" for module in COMMANDS.values()]
    rows = rows_of([line for name in names for line in run(COMMANDS[name])])
    rows += kept({f"python -m {' '.join(COMMANDS[name])}" for name in names})
    rows.sort(key=lambda row: commands.index(row.rsplit("`", 2)[1]))
    rewrite(PAGE, BEGIN, END, f"{machine()}:\n\n" + "\n".join(["| bench | figures | date | command |", "|---|---|---|---|", *rows]))


if __name__ == "__main__":
    main()
