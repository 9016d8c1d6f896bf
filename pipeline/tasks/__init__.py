"""What a batch is and what is measured on it: one file a task."""

from .classification import Classification
from .metrics import METRICS, Metric
from .task import Example, Task

__all__ = ["METRICS", "Classification", "Example", "Metric", "Task"]
