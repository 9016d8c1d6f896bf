"""C4 (arXiv:1910.10683), English: web pages, streamed, so that only as many are fetched as are asked for."""

from collections.abc import Iterator
from functools import partial

from pipeline.tables import UserError, first_line, optional

from .source import Source

REPOSITORY, LANGUAGE = "allenai/c4", "en"


def load(documents: int = 100_000, test_documents: int = 5_000) -> Source:
    """The first `documents` of C4's training split (of 365 million), and the first `test_documents` of its validation
    split (of 365 thousand) as test part. A document has about 480 tokens of a BPE of 32,000.
    """
    for name, value in {"documents": documents, "test_documents": test_documents}.items():
        if value < 1:
            raise UserError(f"{name} {value} must be at least 1")
    identity = {"c4": LANGUAGE, "documents": documents, "test_documents": test_documents}
    return Source(identity, partial(streamed, "train", documents), partial(streamed, "validation", test_documents))


def streamed(split: str, count: int, skip: int) -> Iterator[str]:
    """Documents `skip` to `count` of a split, in the order of its files: only an unshuffled stream resumes exactly."""
    datasets = optional("data set 'c4'", "datasets", "text")
    if skip >= count:
        return
    try:
        rows = datasets.load_dataset(REPOSITORY, LANGUAGE, split=split, streaming=True)
        for row in rows.skip(skip).take(count - skip):
            yield row["text"]
    # `datasets` passes on the errors of several network libraries, which have no class in common.
    except Exception as error:
        raise UserError(
            f"cannot read C4 ({first_line(error)}); check the network, after which this goes on where it stopped, "
            "or use data=text with files of your own"
        ) from error
