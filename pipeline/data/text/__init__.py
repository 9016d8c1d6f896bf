"""Texts for language models: documents, tokenised once into flat files on disk, served as windows of tokens.

To add a text, write one file whose `load(**options)` returns a `Source` and add its row here. Parts: `source`,
`tokenizers`, `shards` (the files), `corpus` (when to make them), `cut` (validation and test), `windows`, `order`.
"""

from ..picture_set import DataSource
from . import c4, files, pydoc
from .source import Source

TEXTS: dict[str, DataSource] = {
    "c4": DataSource(c4.load, kind="text"),
    "pydoc": DataSource(pydoc.load, kind="text"),
    "text": DataSource(files.load, root_names_data=True, kind="text"),
}

__all__ = ["TEXTS", "Source"]
