"""What a network is called with: an example of it is all that a trace, a count or a pass over batches needs."""

from torch import Tensor

Example = Tensor | tuple | dict  # one argument, all positional ones, or keyword arguments


def call_arguments(example: Example) -> tuple[tuple, dict]:
    """(args, kwargs) to call a model with `example`."""
    if isinstance(example, dict):
        return (), example
    return (example if isinstance(example, tuple) else (example,)), {}
