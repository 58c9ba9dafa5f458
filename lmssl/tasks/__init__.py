"""The tasks by recipe name. Anybody's own: `package.module:Class`."""

from collections.abc import Mapping
from typing import Any

from lmssl.config import build, imported
from lmssl.errors import UserError, did_you_mean
from lmssl.tasks.base import Task
from lmssl.tasks.qa import QuestionAnswering
from lmssl.tasks.sentiment import Sentiment
from lmssl.tasks.translation import Translation

TASKS: dict[str, type[Task]] = {task.name: task for task in (Sentiment, Translation, QuestionAnswering)}


def make_task(section: Mapping[str, Any]) -> Task:
    """The task of a recipe section: `{name: sentiment, labels: [20, 100], seeds: 5}`."""
    fields = dict(section)
    name = fields.pop("name", None)
    if not isinstance(name, str):
        raise UserError(f"task.name: {'missing' if name is None else f'expected a name, got {name!r}'}; {did_you_mean(name, TASKS)}")
    return build(TASKS.get(name) or _plugin(name), fields, "task")


def name_of(task: Task) -> str:
    """The recipe name of a task."""
    own = type(task)
    return task.name if TASKS.get(task.name) is own else f"{own.__module__}:{own.__qualname__}"


def _plugin(name: str) -> type[Task]:
    cls = imported(name, TASKS, "task.name")
    if not (isinstance(cls, type) and issubclass(cls, Task) and "__dataclass_params__" in vars(cls)):
        raise UserError(f"task.name: '{name}' is no task: a frozen dataclass that derives from lmssl.tasks.base.Task")
    if missing := sorted({*getattr(cls, "__abstractmethods__", ()), *(member for member in ("name", "column", "classes") if not hasattr(cls, member))}):
        raise UserError(f"task.name: '{name}' is no task yet: it has no {', '.join(missing)}")
    return cls
