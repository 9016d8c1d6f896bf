"""A task says how a batch is taken apart, trained on and measured: one file a task."""

from .classification import Classification
from .language import Language
from .metrics import METRICS, Metric
from .task import Example, Task

__all__ = ["METRICS", "Classification", "Example", "Language", "Metric", "Task"]
