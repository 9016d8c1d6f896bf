"""Texts that a language model itself gives, for methods that need inputs where no data is at hand.

A model knows the language that it was trained on, so the texts that it writes show its layers the activations that real
texts do (LLM-QAT, arXiv:2305.17888, calibrates a quantizer so). Tokens drawn one by one, as often as the model uses
them, cost a few forward passes alone and show less.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.compression.calibrate.outputs import Answers, float_leaves
from pipeline.compression.calibrate.repair import kept_modes
from pipeline.example import Example, call_arguments
from pipeline.tables import UserError

TEXTS = 64  # how many, where nobody says
AT_ONCE = 64  # texts that are written side by side
ROUNDS = 4  # forward passes after which the frequencies of tokens hardly change


@torch.no_grad()
def written_texts(
    model: nn.Module,
    example: Example,
    count: int = TEXTS,
    seed: int = 0,
    temperature: float = 1.0,
    answers: Answers | None = None,
) -> Tensor:
    """(count, T) int64 token ids that the model writes, T as in the example (N, T); the model is untouched.

    Every text starts with the token that starts a text for this model: `config.bos_token_id` where it has one, else the
    first of the example. Each next token is drawn from the softmax of logits / temperature. A model of transformers
    keeps keys and values from token to token; any other reads the whole text again for each token.
    answers: output -> (N * T, vocabulary) logits; None: its first tensor. Raises UserError for other examples.
    """
    ids = token_ids(example)
    generator = torch.Generator(ids.device).manual_seed(seed)
    start = ids.new_full((count, 1), first_token(model, ids))
    with kept_modes(model):
        step = stepper(model.eval(), answers)
        return torch.cat([written(step, part, ids.shape[1], temperature, generator) for part in start.split(AT_ONCE)])


def written(
    step: Callable[[Tensor, Any], tuple[Tensor, Any]], texts: Tensor, length: int, temperature: float, draw: Any
) -> Tensor:
    """(N, length): these texts (N, 1) written on."""
    kept = None
    while texts.shape[1] < length:
        logits, kept = step(texts, kept)
        # The largest of logits and Gumbel noise is a draw from their softmax, and is found without sorting.
        noise = -torch.empty_like(logits).exponential_(generator=draw).log()
        texts = torch.cat([texts, (logits / temperature + noise).argmax(1, keepdim=True)], 1)
    return texts


def stepper(model: nn.Module, answers: Answers | None) -> Callable[[Tensor, Any], tuple[Tensor, Any]]:
    """(texts (N, t), what the last step kept) -> (logits of the next token (N, vocabulary), what this step keeps)."""
    answers, writer = answers or first_scores, writer_in(model)

    def last(output: Any, count: int) -> Tensor:
        logits = answers(output)
        return logits.reshape(count, -1, logits.shape[-1])[:, -1].float()

    def keeping(texts: Tensor, kept: Any) -> tuple[Tensor, Any]:
        assert writer is not None
        output = writer(input_ids=texts if kept is None else texts[:, -1:], past_key_values=kept, use_cache=True)
        return last(output, len(texts)), output.past_key_values

    def again(texts: Tensor, _: Any) -> tuple[Tensor, Any]:
        return last(model(texts), len(texts)), None

    return again if writer is None else keeping


@torch.no_grad()
def unigram_texts(
    model: nn.Module, example: Example, count: int = TEXTS, seed: int = 0, answers: Answers | None = None
) -> Tensor:
    """(count, T) int64 token ids, each drawn by itself as often as the model uses it; the model is untouched.

    The frequencies are the model's mean prediction on such texts, found by drawing and predicting in turn, first with
    all tokens alike. Every text starts as in `written_texts`.
    """
    ids, answers = token_ids(example), answers or first_scores
    generator = torch.Generator(ids.device).manual_seed(seed)
    start = first_token(model, ids)
    with kept_modes(model):
        often = torch.ones(answers(model.eval()(ids[:1])).shape[-1], device=ids.device)
        for _ in range(ROUNDS):
            texts = drawn_texts(often, ids.new_full((8, ids.shape[1]), start), generator)
            logits = answers(model(texts)).float()
            often = logits.flatten(0, -2).softmax(-1).mean(0)
    return drawn_texts(often, ids.new_full((count, ids.shape[1]), start), generator)


def drawn_texts(often: Tensor, texts: Tensor, draw: torch.Generator) -> Tensor:
    """(N, T): these texts with all but their first tokens drawn; often: (vocabulary,)."""
    drawn = torch.multinomial(often, texts[:, 1:].numel(), replacement=True, generator=draw)
    return torch.cat([texts[:, :1], drawn.view(len(texts), -1)], 1)


def first_scores(output: Any) -> Tensor:
    """The first tensor of real numbers in an output."""
    return float_leaves(output)[0]


def writer_in(model: nn.Module) -> nn.Module | None:
    """The model of transformers that this one is or holds, which keeps keys and values; None: there is none."""
    return next((m for m in model.modules() if callable(getattr(m, "prepare_inputs_for_generation", None))), None)


def first_token(model: nn.Module, ids: Tensor) -> int:
    """The id that starts a text: the model's own, else the first of the example."""
    own = getattr(getattr(writer_in(model) or model, "config", None), "bos_token_id", None)
    return int(ids[0, 0]) if own is None else int(own)


def token_ids(example: Example) -> Tensor:
    """The (N, T) token ids of an example. UserError where the network is called with anything else."""
    args, kwargs = call_arguments(example)
    ids = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
    if ids is None or ids.dim() != 2 or ids.is_floating_point():
        raise UserError("texts come from networks of token ids (N, T); for others give data, or pictures=synthetic")
    return ids
