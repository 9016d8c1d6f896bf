"""A griffe extension: lines of a docstring that tell of one argument or field, "ratio: ...", become a list."""

import re
from typing import Any

from griffe import Class, Extension, Function, Object

LINE = re.compile(r"^(\w+(?:, \w+)*): ", re.M)


class Listed(Extension):
    def on_function(self, *, func: Function, **_: Any) -> None:
        list_(func, {parameter.name for parameter in func.parameters})

    def on_class(self, *, cls: Class, **_: Any) -> None:
        made = cls.members.get("__init__")
        names = {parameter.name for parameter in made.parameters} if isinstance(made, Function) else set()
        list_(cls, names | set(cls.members))


def list_(told: Object, names: set[str]) -> None:
    """Put a list where the docstring has lines that begin with these names."""
    if told.docstring is None:
        return

    def item(found: re.Match[str]) -> str:
        said = found[1].split(", ")
        return f"\n- {', '.join(f'`{name}`' for name in said)}: " if names & set(said) else found[0]

    told.docstring.value = re.sub(r"\n\n\n- ", "\n\n- ", LINE.sub(item, told.docstring.value))
