"""Look-up in the project's tables (MODELS, DATASETS, OPTIMIZERS, SCHEDULES, METHODS): one error text for all."""

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any, TypeVar, get_args

T = TypeVar("T")


class UserError(ValueError):
    """An error that the user can fix: the message is one line that names the thing, the value and the fix.

    Scripts print it without a traceback; the compression callback stores it as the reason of a failed row.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(error: BaseException) -> str:
    """An error's message in one line, behind its type where the message alone would not say what happened."""
    text = first_line(error)
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def pick(kind: str, table: Mapping[str, T], name: str) -> T:
    """The entry of `table` called `name`. UserError, with the known names, where there is none."""
    if name not in table:
        raise UserError(f"unknown {kind} {name!r}{nearest(name, table)}; choose from: {', '.join(sorted(table))}")
    return table[name]


def nearest(name: object, known: Iterable[str]) -> str:
    """ " (did you mean 'x'?)", with the known name that is spelled most alike; "" where none is alike."""
    near = difflib.get_close_matches(str(name), known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def check_options(what: str, function: Callable[..., Any], options: Iterable[str], given: int = 0) -> None:
    """UserError for the first option that the function does not take. given: how many arguments go by position."""
    if not (options := list(options)):  # a signature takes a fifth of a millisecond
        return
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = [p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY][given:]
    for key in options:
        if key not in known:
            raise UserError(f"{what} has no option {key!r}; it takes: {', '.join(known) or 'none'}")


def call(what: str, function: Callable[..., T], /, *args: Any, **options: Any) -> T:
    """`function(*args, **options)`; the signature is the schema, so an option that it does not have is a UserError.

    Words in place of numbers, and values that the function itself refuses, become a UserError, too.
    """
    check_options(what, function, options, len(args))
    for p in inspect.signature(function).parameters.values() if options else ():
        if isinstance(options.get(p.name), str) and _is_number(p.annotation):
            raise UserError(f"{what}: {p.name} must be a number, got {options[p.name]!r}")
    try:
        return function(*args, **options)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{what}: {first_line(error)}") from error


def _is_number(annotation: Any) -> bool:
    """Does an annotation admit numbers and no text?"""
    if isinstance(annotation, str):
        return {part.strip() for part in annotation.split("|")} <= {"int", "float", "bool", "None", "Tensor"}
    kinds = get_args(annotation) or (annotation,)
    return all(
        isinstance(kind, type) and kind.__name__ in ("int", "float", "bool", "NoneType", "Tensor") for kind in kinds
    )


def optional(what: str, package: str, extra: str) -> ModuleType:
    """Import a library that only some users need. UserError, with the install command, where it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"{what} needs {package}, which is not there ({first_line(error)}); pip install 'foldability[{extra}]'"
        ) from error
