"""All fifteen drills, each a JSON line on stdout; rewrites the table of docs/reliability.md.

python -m tests.drills             reduced counts, lmssl and stock
python -m tests.drills --full      the counts of the table
python -m tests.drills --slice     a few cases of each, lmssl alone, no table: what the ordinary tests run
"""

import argparse
import json
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

from tests.drills.common import ROOT, Child, Drill, warm
from tests.pages import machine, rewrite

PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- drills: written by `make drills` -->", "<!-- end of drills -->"


def modules() -> dict[str, Drill]:
    names = sorted(p.stem for p in Path(__file__).parent.glob("r[0-9][0-9]_*.py"))
    return {name: import_module(f"tests.drills.{name}").DRILL for name in names}


def run(drill: Drill, count: int, peer: str | None, folder: Path) -> dict:
    """One drill in a process of its own, forked from this warm one."""
    path = folder / "line.json"
    path.unlink(missing_ok=True)

    def work() -> None:
        path.write_text(json.dumps(drill.run(count, 0, peer)))

    begun = time.time()
    child = Child(work, folder)
    code = child.wait(3600)
    if code or not path.exists():
        broken = {"drill": drill.name, "held": False, "tried": 0, "failed": 0, "seconds": round(time.time() - begun, 1), "misses": [f"exit {code}: {child.text()[-1000:]}"]}
        return broken | ({"peer": peer} if peer else {})
    return json.loads(path.read_text())


def table(lines: list[dict], full: bool) -> str:
    """The drills as a Markdown table: how many cases held on lmssl and on the stock stack."""

    def cell(line: dict | None) -> str:
        return "-" if line is None else f"{line['tried'] - line['failed']} of {line['tried']}"

    rows = ["| drill | what must hold | lmssl | stock | seconds |", "|---|---|---:|---:|---:|"]
    ours, stock = ({line["drill"]: line for line in lines if bool(line.get("peer")) == peer} for peer in (False, True))
    for name, drill in modules().items():
        held = " ".join((import_module(f"tests.drills.{name}").__doc__ or "").split()).partition(": ")[2]
        line = ours[drill.name]
        rows.append(f"| {drill.name} | {held[0].upper()}{held[1:]} | {cell(line)} | {cell(stock.get(drill.name))} | {line['seconds']:.0f} |")
    return f"{machine()}, " + ("counts of `make drills-full`" if full else "reduced counts of `make drills`") + ":\n\n" + "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--slice", action="store_true")
    parser.add_argument("--only", nargs="*", help="names, e.g. r01 r08; no table")
    options = parser.parse_args()
    warm()
    lines = []
    with tempfile.TemporaryDirectory() as name:
        for module, drill in modules().items():
            if options.only and module[:3] not in options.only:
                continue
            for peer in (None,) if options.slice else (None, "stock"):
                lines.append(run(drill, drill.slice if options.slice else drill.count(options.full, peer), peer, Path(name)))
                print(json.dumps(lines[-1]), flush=True)
    if not options.slice and not options.only:
        rewrite(PAGE, BEGIN, END, table(lines, options.full))
    return int(any(not line["held"] for line in lines if not line.get("peer")))


if __name__ == "__main__":
    sys.exit(main())
