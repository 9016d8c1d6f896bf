"""Look-up in the project's tables (MODELS, DATASETS, OPTIMIZERS, SCHEDULES, METHODS): one error text for all."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """Something the user can mend: the message is one line that names the thing, the value and the fix.

    Scripts print it without a traceback; the compression callback stores it as the reason of a failed row.
    """


def pick(kind: str, table: Mapping[str, T], name: str) -> T:
    """The entry of `table` called `name`, or a UserError that lists the names there are."""
    if name not in table:
        near = difflib.get_close_matches(str(name), table, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(f"unknown {kind} {name!r}{hint}; choose from: {', '.join(sorted(table))}")
    return table[name]


def call(what: str, function: Callable[..., T], /, *args: Any, **options: Any) -> T:
    """`function(*args, **options)`, refusing options that are not in its signature (the signature is the schema)."""
    parameters = inspect.signature(function).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        known = [p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY][len(args) :]
        for key in options:
            if key not in known:
                raise UserError(f"{what} has no option {key!r}; it takes: {', '.join(known) or 'none'}")
    return function(*args, **options)
