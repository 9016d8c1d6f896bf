"""A task says how a batch is taken apart, trained on and measured: one file a task."""

from collections.abc import Callable

from pipeline.metrics import METRICS, Metric

from .classification import Classification, of_pictures
from .language import Language, of_texts
from .task import Task

__all__ = ["METRICS", "TASKS", "USUAL", "Classification", "Language", "Metric", "Task"]

# By name: a builder that takes the facts of the data (see pipeline.models) and the task's own options.
TASKS: dict[str, Callable[..., Task]] = {
    "classification": of_pictures,
    "language": of_texts,
}
# By the kind of data: the task where none is named.
USUAL = {"pictures": "classification", "text": "language"}
