"""The shape of the code: floors, file sizes, and the tree that the README shows."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lmssl"
FLOORS = {
    "errors": -1,
    "config": 0,
    "output": 0,
    "machine": 0,
    "statistics": 0,
    "words": -1,
    "ranks": 0,
    "objectives": 0,
    "byte_pairs": 0,
    "vocabulary": 0,
    "tokenization": 1,
    "data": 1,
    "packing": 1,
    "lookups": 0,
    "activations": 0,
    "models": 1,
    "forward": 2,
    "checkpoints": 1,
    "optimizers": 1,
    "arguments": 1,
    "evaluation": 1,
    "likelihood": 1,
    "watch": 1,
    "probe": 3,
    "beginnings": 2,
    "trainer": 2,
    "pretraining": 3,
    "tasks": 3,
    "evidence": 2,
    "report": 3,
    "cards": 3,
    "display": 3,
    "folders": 4,
    "recipe": 4,
    "predict": 4,
    "history": 5,
    "runs": 6,
    "scoring": 6,
    "plan": 7,
    "cli": 8,
    "__main__": 9,
    "__init__": 9,
}
WITHIN = [
    ["objectives.base", "objectives.cross_entropy"],
    ["data.verses", "data.formats", "data.corpus", "data.contamination", "data.tokens", "data.preparation", "data.stream"],
    ["tasks.adapters", "tasks.base", "tasks.generation", "tasks.squad", "tasks.baseline", "tasks.ledger", "tasks.curve"],
    ["tasks.base", "tasks.generation", "tasks.squad", "tasks.qa"],
    ["tasks.base", "tasks.sentiment"],
    ["tasks.base", "tasks.generation", "tasks.translation"],
]
"""Inside one floor: a later one may import the earlier."""
BESIDE = {
    ("data", "tokenization"),
    ("vocabulary", "byte_pairs"),
    ("output", "machine"),
    ("output", "ranks"),
    ("evaluation", "data"),
    ("objectives", "config"),
    ("watch", "data"),
    ("watch", "optimizers"),
    ("objectives", "machine"),
    ("packing", "data"),
}
"""Imports between siblings that the design allows: tokens need a tokenizer, evaluation needs rows, dropout is keyed like them."""
TOP = {"pyproject.toml", "README.md", "lmssl", "recipes", "tests", "tokenizer_assets", "docs", "LICENSE", "Makefile", "constraints.txt"}


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    """What a module imports of lmssl, but for what only its annotations need."""
    tree, found = ast.parse(path.read_text()), set()
    typing_only = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" for inner in ast.walk(node)}
    for node in (n for n in ast.walk(tree) if id(n) not in typing_only):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lmssl"):
            found |= {f"{node.module}.{a.name}" if node.module in ("lmssl", "lmssl.data", "lmssl.tasks", "lmssl.objectives") else node.module for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith("lmssl.")}
    return {name.removeprefix("lmssl.") for name in found if name != "lmssl" and not name.startswith("lmssl.__version")}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_floors(path):
    own = path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
    floor, package = FLOORS[own.split(".")[0]], own.split(".")[0]
    for name in imports_of(path):
        other = name.split(".")[0]
        if other == package or (package, other) in BESIDE:
            continue
        assert FLOORS[other] < floor, f"{own} (floor {floor}) imports {name} (floor {FLOORS[other]})"


def test_within_packages():
    for chain in WITHIN:
        for number, name in enumerate(chain):
            imported = imports_of(PACKAGE / (name.replace(".", "/") + ".py"))
            late = [later for later in chain[number + 1 :] if any(i.startswith(later) for i in imported)]
            assert not late, f"{name} imports {late}"


def test_no_file_over_500_lines():
    for path in [*modules(), *(ROOT / "tests").rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 500, path


def test_top_level():
    listed = subprocess.run(["git", "ls-tree", "--name-only", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert listed or not (ROOT / ".git").exists()
    assert {name for name in listed if not name.startswith(".")} <= TOP
    assert {p.name for p in ROOT.iterdir()} >= TOP


def test_readme_tree_is_true():
    text = (ROOT / "README.md").read_text()
    block = re.search(r"```\nlmssl/\n(.*?)```", text, re.S)[1]
    shown = set()
    folder = ""
    for line in block.splitlines():
        if re.match(r"^\S", line):
            break
        name = line.split()[0]
        indent = len(line) - len(line.lstrip())
        folder = "" if indent == 2 else folder
        if name.endswith("/"):
            folder = name
            continue
        shown.add((folder if indent > 2 else "") + name)
    assert shown == {str(p.relative_to(PACKAGE)) for p in modules() if p.name != "__init__.py" or p.parent == PACKAGE}


def test_names_of_the_package_resolve():
    import lmssl

    for name in lmssl.__all__:
        assert getattr(lmssl, name) is not None


def test_objectives_page_names_every_field():
    import dataclasses

    from lmssl.objectives import OBJECTIVES

    lines = {line.split("`")[1]: line for line in (ROOT / "docs" / "objectives.md").read_text().splitlines() if line.startswith("| `")}
    for name, objective in OBJECTIVES.items():
        for field in dataclasses.fields(objective):
            assert f"`{field.name}` {field.default}" in lines[name]


def test_tasks_page_names_every_field():
    import dataclasses

    from lmssl.tasks import TASKS
    from lmssl.tasks.base import Task

    page = (ROOT / "docs" / "tasks.md").read_text().split("## Fields")[1].split("## Data")[0]
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    shared = {f.name for f in dataclasses.fields(Task)}
    for name in shared:
        assert f"`{name}`" in page
    for name, task in TASKS.items():
        for field in dataclasses.fields(task):
            if field.name not in shared:
                assert f"`{field.name}`" in rows[name], (name, field.name)
                if isinstance(field.default, int | float) and not isinstance(field.default, bool):
                    assert f"`{field.name}` {field.default}" in rows[name]


def test_recipes_page_names_every_default():
    from lmssl.arguments import OURS, finetune_defaults, pretrain_defaults

    page = (ROOT / "docs" / "recipes.md").read_text()
    for name in {*pretrain_defaults(), *finetune_defaults(), *OURS} - {"use_cpu", "tf32", "logging_strategy", "output_dir"}:
        assert f"`{name}`" in page, name


def test_recipes_readme_names_every_recipe():
    text = (ROOT / "recipes" / "README.md").read_text()
    for path in [*(ROOT / "recipes").glob("pretrain/*.yaml"), *(ROOT / "recipes").glob("finetune/*.yaml")]:
        assert str(path.relative_to(ROOT / "recipes")) in text


def test_nothing_names_this_machine():
    for path in ROOT.rglob("*"):
        if path.suffix in (".py", ".md", ".yaml", ".toml") and not any(part.startswith(".venv") or part in ("runs", ".git") for part in path.parts):
            assert "/work/" + "main" not in path.read_text(), path


def test_the_oldest_versions_are_those_that_are_declared():
    """`make test-oldest` installs the floor of every range that pyproject.toml gives."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {}
    for line in sum(project["optional-dependencies"].values(), project["dependencies"]):
        if found := re.fullmatch(r"([\w-]+)(?:>=|==)([\d.]+)", line):
            declared[found[1]] = found[2]
    pinned = dict(line.split("==") for line in (ROOT / "tests" / "constraints-oldest.txt").read_text().split())
    tools = {"ruff", "mypy", "pre-commit"}  # `make check` runs them, the tests do not
    for name in declared.keys() - tools:
        floor, pin = ([*map(int, version.split("."))] for version in (declared[name], pinned[name]))
        assert floor == pin[: len(floor)], name
        assert not any(pin[len(floor) :]), name
    assert pinned.keys() == declared.keys() - tools
