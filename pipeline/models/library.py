"""What builders of other libraries' models share: imports and downloads that may fail, and what pictures they want."""

import difflib
import importlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

from pipeline.tables import UserError, first_line, one_line


@dataclass(frozen=True)
class InputConfig:
    """How pictures are made ready for a network, in the words of timm and of data=imagenet.

    size: side in pixels; crop_pct: size as a fraction of what the shorter edge is resized to before the centre is cut
    out; mean, std: of the channels scaled to 0..1; interpolation: "bilinear", "bicubic", ...
    """

    size: int
    crop_pct: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str


def side(size: int | Sequence[int] | Mapping[str, int]) -> int:
    """Of the squares that a size stands for: 224, (224, 224), {"height": 224, "width": 224}, {"shortest_edge": 224}."""
    sides = set(size.values() if isinstance(size, Mapping) else [size] if isinstance(size, int) else size)
    if len(sides) != 1:
        raise UserError(f"this model wants pictures of size {size}, and only squares can be made; set data.size")
    return sides.pop()


def optional(package: str, extra: str) -> ModuleType:
    """A library that only some models need."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"this model needs {package}, which is not there ({first_line(error)}); pip install 'foldability[{extra}]'"
        ) from error


def check_known(what: str, name: str, known: Collection[str], lister: str) -> None:
    """Refuse a name that is none of the library's (too many to list), with those near it."""
    if name not in known:
        near = [other for other in known if name in other][:5] or difflib.get_close_matches(name, known, n=5)
        raise UserError(
            f"unknown {what} {name!r}; " + (f"near it: {', '.join(near)}" if near else f"{lister} lists them")
        )


GIVE_FILE = "set model.pretrained=null and give a file with checkpoint="


@contextmanager
def trained_weights(what: str, hub: bool = True, fix: str = GIVE_FILE) -> Iterator[None]:
    """Around what loads weights from files, the cache or the network: fails in one line, and soon.

    hub: may ask the hub of Hugging Face. Its client tries six times for each file, which takes 27 to 47 s without a
    network (measured) and minutes where packets get lost. One request beforehand says whether to use the cache alone.
    """
    from huggingface_hub import constants, get_session  # takes a moment, and most runs do not need it

    away, offline = "", constants.HF_HUB_OFFLINE
    try:
        if hub and not offline:
            get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:  # of whichever client it has
        away = f"not in the cache, and no connection to {constants.ENDPOINT} ({first_line(error)})"
        constants.HF_HUB_OFFLINE = True
    try:
        with muted():
            yield
    except (UserError, TypeError):  # what was asked for is wrong
        raise
    except Exception as error:  # of a network, a cache, a file: each library has its own
        raise UserError(f"no trained weights for {what}: {away or one_line(error)}; {fix}") from error
    finally:
        constants.HF_HUB_OFFLINE = offline


@contextmanager
def muted() -> Iterator[None]:
    """Without what libraries log: where it matters they raise as well."""
    before, handlers = logging.root.manager.disable, list(logging.root.handlers)
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
        logging.root.handlers[:] = handlers  # logging.warning() adds one
