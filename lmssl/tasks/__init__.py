"""The tasks by recipe name. Anybody's own: `package.module:Class`."""

from collections.abc import Mapping
from typing import Any

from lmssl.config import build, chosen
from lmssl.errors import UserError
from lmssl.tasks.base import Task
from lmssl.tasks.qa import QuestionAnswering
from lmssl.tasks.sentiment import Sentiment
from lmssl.tasks.translation import Translation

TASKS: dict[str, type[Task]] = {task.name: task for task in (Sentiment, Translation, QuestionAnswering)}


def make_task(section: Mapping[str, Any]) -> Task:
    """The task of a recipe section: `{name: sentiment, labels: [20, 100], seeds: 5}`."""
    cls, fields = chosen(section, TASKS, "task")
    if section["name"] not in TASKS:
        _check(cls, section["name"])
    return build(cls, fields, "task")


def _check(cls: Any, name: str) -> None:
    """Refuse what is no task, or has not all of one."""
    if not (isinstance(cls, type) and issubclass(cls, Task) and "__dataclass_params__" in vars(cls)):
        raise UserError(f"task.name: '{name}' is no task: a frozen dataclass that derives from lmssl.tasks.base.Task")
    if missing := sorted({*getattr(cls, "__abstractmethods__", ()), *(member for member in ("name", "column", "classes") if not hasattr(cls, member))}):
        raise UserError(f"task.name: '{name}' is no task yet: it has no {', '.join(missing)}")
