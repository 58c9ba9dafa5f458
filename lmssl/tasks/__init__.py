"""The tasks by recipe name."""

from collections.abc import Mapping
from typing import Any

from lmssl.config import build
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
    if not isinstance(name, str) or name not in TASKS:
        raise UserError(f"task.name: {'missing' if name is None else f'no task {name!r}'}; {did_you_mean(name, TASKS)}")
    return build(TASKS[name], fields, "task")
