"""Language modelling: the next token of a text.

A batch is (N, T) token ids, or a dict with "input_ids" and, where they are there, "attention_mask" (0: padding),
"labels" (as Hugging Face shifts them: labels[t] is predicted at t - 1; -100: not counted, such as a token behind a
document border) and "bytes" ((N,) how many bytes of text the counted tokens of each sequence stand for).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.tables import UserError

from .parts import by_parts
from .task import IGNORED, Example, Layout, Task, double, widened

OWN = ("labels", "bytes")  # keys of a batch that are not for the network


@dataclass(frozen=True)
class Language(Task):
    """Perplexity, the exponential of the mean loss over all counted tokens; n counts sequences.

    bits_per_byte compares networks of different tokenizers; NaN where batches do not say their bytes. The first token
    of a sequence is predicted by nothing, so it is not counted.
    """

    output: int | str | None = None  # where in an output the logits are, see Layout
    vocabulary: int | None = None  # how many tokens the network predicts; None: decided on the first batch

    name = "language"
    metrics = ("perplexity", "loss", "token_acc", "bits_per_byte")
    size = 5  # sequences, tokens that count, right ones, nats, bytes

    @property
    def chance(self) -> float | None:
        """The vocabulary, which is the perplexity where all tokens are alike."""
        return None if self.vocabulary is None else float(self.vocabulary)

    def inputs(self, batch: Any) -> Example:
        """The token ids, and what else the batch holds for the network."""
        if isinstance(batch, Mapping):
            return {key: value for key, value in batch.items() if key not in OWN}
        return batch[0] if isinstance(batch, list | tuple) and len(batch) == 1 else batch

    def settled(self, output: Any, batch: Any) -> "Language":
        self.check(output, batch)
        return replace(self, vocabulary=self.logits(output).shape[2])

    def check(self, output: Any, batch: Any) -> None:
        """UserError for ids that are not (N, T), logits that are not (N, T, vocabulary), ids beyond the vocabulary."""
        ids, logits = token_ids(batch), self.logits(output)
        if ids.dim() != 2 or ids.is_floating_point() or logits.dim() != 3 or logits.shape[:2] != ids.shape:
            raise UserError(
                f"language needs (N, T) token ids and (N, T, vocabulary) logits, got {tuple(ids.shape)} {ids.dtype} "
                f"and {tuple(logits.shape)}; mend the collate function, or say output="
            )
        labels = targets(batch)
        wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= logits.shape[2]))]
        if len(wrong):
            raise UserError(
                f"token id {int(wrong[0])} is none of the {logits.shape[2]} that the network predicts; give it texts "
                "of its own tokenizer"
            )

    def loss(self, output: Any, batch: Any, label_smoothing: float = 0.0) -> Tensor:
        logits, labels = self.logits(output).flatten(0, 1), self.targets(output, batch)
        nats = by_parts(lambda some, told: cross_entropy(widened(some), told, label_smoothing), logits, labels)
        return nats.sum() / (labels != IGNORED).sum()

    def totals(self, output: Any, batch: Any) -> Tensor:
        logits, labels = self.logits(output).flatten(0, 1), self.targets(output, batch)
        nats, right = by_parts(judged, logits, labels).unbind(1)
        lengths = batch["bytes"].sum() if isinstance(batch, Mapping) and "bytes" in batch else nats.new_zeros(())
        found = [nats.new_full((), len(token_ids(batch))), (labels != IGNORED).sum(), right.sum(), double(nats).sum()]
        return torch.stack([double(value) for value in (*found, lengths)])

    def values(self, totals: Tensor) -> dict[str, float]:
        _, tokens, right, nats, lengths = totals.tolist()
        loss = nats / tokens if tokens else math.nan
        return {
            "perplexity": math.exp(loss) if not loss > 700 else math.inf,  # beyond the largest double
            "loss": loss,
            "token_acc": right / tokens if tokens else math.nan,
            "bits_per_byte": nats / math.log(2) / lengths if lengths else math.nan,
        }

    def count(self, totals: Tensor) -> int:
        return int(totals[0])

    def answers(self, output: Any) -> Tensor:
        """(N * T, vocabulary): a token counts as a picture does."""
        return widened(self.logits(output).flatten(0, 1))

    def real(self, batch: Any) -> Tensor | None:
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        return None if mask is None else mask.flatten() != 0

    def targets(self, output: Any, batch: Any) -> Tensor:
        """The token behind each one; behind the last of a sequence there is none."""
        return F.pad(targets(batch), (0, 1), value=IGNORED).flatten()

    def logits(self, output: Any) -> Tensor:
        """(N, T, vocabulary), in the precision of the network."""
        return Layout(output=self.output).scores(output)


def judged(logits: Tensor, labels: Tensor) -> Tensor:
    """(rows, 2): the nats of each label, and whether the largest logit is its; both 0 where it is not counted."""
    logits = widened(logits)
    right = logits.argmax(1) == labels
    return torch.stack([cross_entropy(logits, labels), right], 1)


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """(rows,) nats, 0 where the label is not counted."""
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none", label_smoothing=label_smoothing)


def of_texts(vocabulary: int, context: int) -> Language:
    """The task of a network that predicts tokens of this vocabulary."""
    return Language(vocabulary=vocabulary)


def token_ids(batch: Any) -> Tensor:
    """(N, T) of a batch. UserError where it has none."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    ids = ids[0] if isinstance(ids, list | tuple) and len(ids) == 1 else ids
    if not isinstance(ids, Tensor):
        kind = type(batch).__name__
        raise UserError(f"the batch is a {kind} without token ids; give (N, T) ids, or them as 'input_ids'")
    return ids


def targets(batch: Any) -> Tensor:
    """(N, T - 1) int64: the token behind each one, IGNORED where it is not counted."""
    if not isinstance(batch, Mapping):
        return token_ids(batch)[:, 1:]
    labels = batch.get("labels", token_ids(batch))[:, 1:]
    mask = batch.get("attention_mask")
    return labels if mask is None else labels.masked_fill(mask[:, 1:] == 0, IGNORED)
