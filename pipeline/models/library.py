"""Shared by builders of other libraries' models: imports and downloads that may fail, and how to prepare pictures."""

import difflib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline.tables import UserError, first_line, one_line


@dataclass(frozen=True)
class InputConfig:
    """How pictures are made ready for a network, in the words of timm and of data=imagenet.

    size: side in pixels; crop_pct: size as a fraction of the shorter edge, once resized, before the centre is cut out;
    mean, std: of the channels scaled to 0..1; interpolation: "bilinear", "bicubic", ...
    """

    size: int
    crop_pct: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str


def side(size: int | Sequence[int] | Mapping[str, int]) -> int:
    """Side of the square: 224, (224, 224), {"height": 224, "width": 224} and {"shortest_edge": 224} give 224."""
    sides = set(size.values() if isinstance(size, Mapping) else [size] if isinstance(size, int) else size)
    if len(sides) != 1:
        raise UserError(f"this model wants pictures of size {size}, and only squares can be made; set data.size")
    return sides.pop()


def check_known(what: str, name: str, known: Collection[str], lister: str) -> None:
    """UserError, with the names near it, for a name that the library does not have; it has too many to list all."""
    if name not in known:
        near = [other for other in known if name in other][:5] or difflib.get_close_matches(name, known, n=5)
        raise UserError(
            f"unknown {what} {name!r}; " + (f"near it: {', '.join(near)}" if near else f"{lister} lists them")
        )


GIVE_FILE = "set model.pretrained=null and give a file with checkpoint="


@contextmanager
def trained_weights(what: str, hub: bool = True, fix: str = GIVE_FILE) -> Iterator[None]:
    """Inside, weights are loaded from files, the cache or the network; a failure becomes a one-line UserError, soon.

    hub: may ask the hub of Hugging Face. Its client tries six times for each file, which takes 27 to 47 s without a
    network (measured) and minutes where packets get lost. One request beforehand decides whether the cache is all.
    """
    from huggingface_hub import constants, get_session  # slow to import, and most runs do not need it

    away, offline = "", constants.HF_HUB_OFFLINE
    try:
        if hub and not offline:
            get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:  # the type depends on the hub's HTTP client
        away = f"not in the cache, and no connection to {constants.ENDPOINT} ({first_line(error)})"
        constants.HF_HUB_OFFLINE = True
    try:
        with muted():
            yield
    except (UserError, TypeError):  # the caller asked for something wrong
        raise
    except Exception as error:  # network, cache or file: each library raises its own types
        raise UserError(f"no trained weights for {what}: {away or one_line(error)}; {fix}") from error
    finally:
        constants.HF_HUB_OFFLINE = offline


@contextmanager
def muted() -> Iterator[None]:
    """Inside, libraries log nothing: where something matters, they also raise."""
    before, handlers = logging.root.manager.disable, list(logging.root.handlers)
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
        logging.root.handlers[:] = handlers  # logging.warning() adds one
