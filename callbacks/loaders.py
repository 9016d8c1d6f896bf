"""The user's own batches, as Lightning's validation hands them to a step; reading them leaves no trace."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.trainer.connectors.data_connector import _parse_num_batches, _request_dataloader
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from pipeline.batches import sample, samples
from pipeline.evaluate import evaluating
from pipeline.tables import UserError

Batch = Any
Data = Dataset | DataLoader | Iterable[Batch]
STAGES = {"val": RunningStage.VALIDATING, "test": RunningStage.TESTING}


class Batches:
    """One loader's batches on the device: every pass fetches them anew and gets the same.

    limit: give only so many batches; None: all
    """

    def __init__(
        self, loader: Iterable[Batch], move: Callable[[Batch], Batch], limit: int | None = None, head: Any = None
    ) -> None:
        self.loader, self.move, self.limit = loader, move, limit
        self.head = loader if head is None else head
        self._drawn_by = torch.get_rng_state()

    def __iter__(self) -> Iterator[Batch]:
        return self._moved(self.loader)

    def first(self) -> Batch:
        """The first batch, fetched in this process: worker processes would fetch further batches ahead.

        Where processes share out a loader, this is the first batch of the whole loader, the same on every process.
        """
        here = {"num_workers": 0, "prefetch_factor": None, "timeout": 0}
        head = twin(self.head, **here) if isinstance(self.head, DataLoader) else self.head
        for batch in self._moved(head):
            return batch
        raise UserError("there are no batches to look at; fix the sampler or the limit of the validation data")

    def _moved(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        with untouched(loader):
            # A loader without a generator of its own draws its order here, from the global one.
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(self._drawn_by)
                iterator = islice(loader, self.limit)
                ahead = list(islice(iterator, 1))
            for batch in ahead:
                yield self.move(batch)
            yield from map(self.move, iterator)


def evaluation_batches(
    trainer: Trainer,
    pl_module: LightningModule,
    split: str,
    eval_data: Data | None = None,
    batch_size: int | None = None,
) -> dict[str, Batches]:
    """This process's share of the evaluation batches: {"val": first loader, "val/1": second loader, ...}, or "test".

    eval_data: Dataset, loader or batches to evaluate on in place of the Trainer's own loaders
    batch_size: for a Dataset; None: 256

    Every sample counts once, though Lightning's DistributedSampler repeats some to fill up. Every process must call
    this alike. Raises UserError where there are no loaders.
    """
    loop = loop_of(trainer, split)
    if eval_data is not None:
        loaders, limits = [as_loader(eval_data, batch_size)], [int(trainer.fast_dev_run) or None]
    else:
        loaders = loaders_of(trainer, loop)
        limits = limits_of(trainer, loop, split, loaders)
    if not loaders:
        raise UserError("there is nothing to look at; give the Trainer validation data or pass eval_data=")
    found = {}
    for i, (loader, limit) in enumerate(zip(loaders, limits, strict=True)):
        mover = mover_of(trainer, pl_module, STAGES[split], i)
        own, head = share(trainer, loader, shared_by_user=eval_data is None and not samplers_are_replaced(trainer))
        found[f"{split}/{i}" if i else split] = Batches(own, mover, limit, head)
    return found


def calibration_batches(
    trainer: Trainer, pl_module: LightningModule, data: Data, size: int, seed: int, batch_size: int | None = None
) -> Batches:
    """About `size` training samples on the device, in whole batches of equal size, the same on every process.

    data: a Dataset, or a loader whose samples have indices: `seed` draws the samples, a loader's from those that its
        own sampler may give. Any other loader gives its first batches, until there are `size` samples
    batch_size: None: 256

    Transfer hooks are told that this is validation, so that they do not augment. Every process must call this alike.
    Raises UserError where there are no samples.
    """
    loader = as_loader(data, batch_size)
    loader = twin(loader) if isinstance(loader, DataLoader) else loader
    with untouched(loader):
        if isinstance(loader, DataLoader) and drawable(loader):
            order = drawn_order(loader, size, seed, batch_size or 256)
            found = twin(loader, batch_sampler=trainer.strategy.broadcast(order))
        else:
            found = order = first_batches(loader, size)
            found = trainer.strategy.broadcast(found) if trainer.world_size > 1 else found
    if not order:
        raise UserError(f"there are no {size} training samples to look at; fix repair_data= or repair_size=")
    return Batches(found, mover_of(trainer, pl_module, RunningStage.VALIDATING, 0))


# --- which loaders


def loop_of(trainer: Trainer, split: str) -> _EvaluationLoop:
    if split == "test":
        return trainer.test_loop
    return trainer.fit_loop.epoch_loop.val_loop if trainer.state.fn == TrainerFn.FITTING else trainer.validate_loop


def loaders_of(trainer: Trainer, loop: _EvaluationLoop) -> list[Any]:
    """The loaders of Lightning's loop, in order: as Lightning prepared them, or, on several processes, as given.

    A loop that has not run, or that is switched off (limit_val_batches=0), still knows where its loaders come from.
    """
    combined = loop._combined_loader
    if combined is None or trainer.world_size > 1:
        source = loop._data_source
        if source.instance is None or not source.is_defined():
            return []
        given = _request_dataloader(source)
        combined = given if isinstance(given, CombinedLoader) else CombinedLoader(given, "sequential")
    if combined._mode != "sequential":
        raise UserError(
            f"a CombinedLoader of mode {combined._mode!r} gives batches of several loaders at once; "
            "use mode 'sequential', or pass eval_data="
        )
    return [loader for loader in combined.flattened if loader is not None]


def limits_of(trainer: Trainer, loop: _EvaluationLoop, split: str, loaders: Sequence[Any]) -> list[int | None]:
    """How many batches of each loader Lightning uses. A limit of 0 switches off Lightning's validation, not ours."""
    said = trainer.limit_test_batches if split == "test" else trainer.limit_val_batches
    if said == 0 or (isinstance(said, float) and said == 1):  # 1.0 is all, 1 is one batch
        return [None] * len(loaders)
    found = loop._max_batches or [_parse_num_batches(STAGES[split], length(loader), said) for loader in loaders]
    return [None if limit == float("inf") else int(limit) for limit in found]


def length(loader: Any) -> int | float:
    size = sized_len(loader)
    return float("inf") if size is None else size


def as_loader(data: Data, batch_size: int | None = None) -> Iterable[Batch]:
    """A Dataset in a loader, with its own `collate` if it has one; a loader, or any batches, as they are."""
    of_samples = hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, list | tuple)
    if isinstance(data, DataLoader) or not (isinstance(data, Dataset) or of_samples):
        return data
    generator = torch.Generator()  # the loader's own, because iterating would else draw from the global one
    return DataLoader(data, batch_size or 256, collate_fn=getattr(data, "collate", None), generator=generator)


# --- a process's share


def samplers_are_replaced(trainer: Trainer) -> bool:
    """Does Lightning share out the samples over processes? If not (use_distributed_sampler=False), the user does."""
    return trainer._accelerator_connector.use_distributed_sampler


def share(trainer: Trainer, loader: Any, shared_by_user: bool) -> tuple[Any, Any]:
    """(this process's part of a loader, a loader whose first batch is the same on every process)

    The part is every world_size-th batch of the order that the first process drew. A loader without indices, or one
    that the user shares out, is taken as Lightning takes it.
    """
    processes = trainer.world_size
    if not isinstance(loader, DataLoader):
        return loader, loader
    loader = twin(loader)
    if processes == 1 or shared_by_user or isinstance(loader.dataset, IterableDataset):
        return loader, loader
    if isinstance(order_of(loader), DistributedSampler):
        own = without_padding(loader)
        return own, own
    with untouched(loader):
        order = trainer.strategy.broadcast(list(loader._index_sampler))
    return in_order(loader, order[trainer.global_rank :: processes]), in_order(loader, order[:1])


def order_of(loader: DataLoader) -> Any:
    """The sampler that the loader uses: one with its own batch sampler also has a `sampler`, which is ignored."""
    return getattr(loader.batch_sampler, "sampler", loader.sampler)


def in_order(loader: DataLoader, order: Sequence[Any]) -> DataLoader:
    """The same loader with these batches of indices (or samples, where it makes no batches)."""
    return twin(loader, **{"batch_sampler" if loader._auto_collation else "sampler": order})


def without_padding(loader: DataLoader) -> DataLoader:
    """The loader without repeated samples: DistributedSampler gives every n-th sample, and repeats some to fill up."""
    sampler = order_of(loader)
    if type(loader.batch_sampler) is not BatchSampler:
        return loader
    whole = len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))
    with untouched(loader):
        own = list(sampler)[:whole]
    batches = BatchSampler(own, loader.batch_sampler.batch_size, loader.batch_sampler.drop_last)
    return in_order(loader, list(batches))


def twin(loader: DataLoader, **changed: Any) -> DataLoader:
    """A loader of the same class, dataset, sampler, collate function and workers, with other values of attributes.

    Its workers live for one pass: persistent workers would carry their random state into the user's own validation.
    """
    made = copy.copy(loader)
    made.__dict__.update({"persistent_workers": False, "_iterator": None, **changed})  # a loader refuses setattr
    return made


# --- which samples to calibrate on


def drawable(loader: DataLoader) -> bool:
    """Can single samples of the loader be drawn by index?"""
    return not isinstance(loader.dataset, IterableDataset) and loader._auto_collation


def drawn_order(loader: DataLoader, size: int, seed: int, batch_size: int) -> list[list[Any]]:
    """Batches of indices, drawn by `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # samplers may draw at random
        indices = given_by_sampler(loader)
    drawn = [indices[i] for i in sample(len(indices), size, seed, batch_size)]
    return [drawn[i : i + batch_size] for i in range(0, len(drawn), batch_size)]


def given_by_sampler(loader: DataLoader) -> Sequence[Any]:
    """Every index that the loader may give, in an order that does not depend on chance where that is possible."""
    if type(loader.batch_sampler) is not BatchSampler:
        return unique(index for batch in loader.batch_sampler for index in batch)
    sampler = order_of(loader)
    if type(sampler) in (SequentialSampler, RandomSampler, DistributedSampler):
        return range(len(loader.dataset))
    return unique(sampler.indices if type(sampler) is SubsetRandomSampler else sampler)


def unique(indices: Iterable[Any]) -> list[Any]:
    found = list(dict.fromkeys(int(i) if isinstance(i, torch.Tensor) else i for i in indices))
    return sorted(found) if all(isinstance(i, int) for i in found) else found


def first_batches(loader: Iterable[Batch], size: int) -> list[Batch]:
    """The first batches, until there are `size` samples; all as large as the first, so that samples count alike."""
    found: list[Batch] = []
    with untouched(loader):
        for batch in loader:
            if not found or samples(batch) == samples(found[0]):
                found.append(batch)
            if (len(found) + 1) * samples(found[0]) > size:
                return found
    return found


# --- as Lightning hands batches over


def mover_of(
    trainer: Trainer, pl_module: LightningModule, stage: RunningStage, dataloader_idx: int
) -> Callable[[Batch], Batch]:
    """A function that prepares a batch as Lightning's evaluation loop does, with hooks of module and data module."""

    def move(batch: Batch) -> Batch:
        with as_if(trainer, pl_module, stage):
            batch = trainer.precision_plugin.convert_input(batch)
            batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)
            return trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)

    return move


@contextmanager
def as_if(trainer: Trainer, pl_module: LightningModule, stage: RunningStage) -> Iterator[None]:
    """Inside, Trainer and module are in this stage: hooks that augment ask them whether this is training."""
    before = trainer.state.stage
    with evaluating(pl_module):
        trainer.state.stage = stage
        try:
            yield
        finally:
            trainer.state.stage = before


@contextmanager
def untouched(loader: Any) -> Iterator[None]:
    """Gives the generators of the loader and its samplers their state back: a training loader may share them."""
    found = {id(g): (g, g.get_state()) for g in generators(loader)}
    try:
        yield
    finally:
        for generator, state in found.values():
            generator.set_state(state)


def generators(loader: Any) -> Iterator[torch.Generator]:
    """The generators of a loader, of its sampler and batch sampler, and of samplers inside these."""
    seen: set[int] = set()
    todo = [loader]
    while todo:
        thing = todo.pop()
        if thing is None or id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(generator := getattr(thing, "generator", None), torch.Generator):
            yield generator
        todo += [getattr(thing, name, None) for name in ("sampler", "batch_sampler")]
