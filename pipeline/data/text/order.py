"""The order of training windows: it follows from seed and epoch, and goes on at any place of an epoch."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, DistributedSampler

from pipeline.tables import UserError


class Shuffle(DistributedSampler):
    """A permutation of all indices that depends on (seed, epoch) alone, of which each process takes every n-th.

    Lightning puts its own sampler in place of any that is no DistributedSampler. That one's permutation of (0, epoch 1)
    is that of (1, epoch 0), and it makes a list of Python's integers, 40 bytes for each index of all processes.
    """

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.dataset))
        return map(int, order[: self.total_size][self.rank :: self.num_replicas])


class ResumableLoader(DataLoader):
    """A DataLoader over `Shuffle` that can be asked where it is, and be set there.

    The place is counted in windows of all processes that were handed out, so that what workers fetched ahead counts as
    not seen, and another number of processes may go on.
    """

    _place = (0, 0)  # epoch, windows of all processes that were handed out in it
    _resumed = False

    def __copy__(self) -> "ResumableLoader":
        """A copy starts at the start: whoever looks at batches beside the training does so through a copy."""
        made = type(self).__new__(type(self))
        made.__dict__.update(self.__dict__, _resumed=False)
        return made

    def __iter__(self) -> Iterator[Any]:
        # Lightning asks for the iterator before it sets the epoch. A generator looks at it when the first batch is due.
        epoch, (epoch_then, windows) = getattr(self.sampler, "epoch", 0), self._place
        done = windows // self.step if self._resumed and epoch == epoch_then else 0
        self.__dict__["_resumed"] = False
        rest = self.rest(done)
        for number, batch in enumerate(DataLoader.__iter__(rest), done + 1):
            self.__dict__["_place"] = (epoch, number * self.step)
            yield batch

    @property
    def step(self) -> int:
        """Windows in one batch of all processes. Lightning's overfit_batches puts a sampler of its own in the place."""
        return self.batch_size * getattr(self.sampler, "num_replicas", 1)

    def rest(self, done: int) -> DataLoader:
        """This loader without its first `done` batches."""
        if not done:
            return self
        return DataLoader(
            self.dataset,
            batch_sampler=islice(self.batch_sampler, done, None),
            num_workers=self.num_workers,
            collate_fn=self.collate_fn,
            pin_memory=self.pin_memory,
        )

    def state_dict(self) -> dict[str, int]:
        epoch, windows = self._place
        return {
            "epoch": epoch,
            "windows": windows,
            "size": len(self.dataset),
            "seed": getattr(self.sampler, "seed", None),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at this place. UserError for one in the order of another set of windows or of another seed."""
        here = self.state_dict()
        if any(state[key] != here[key] for key in ("size", "seed")):
            orders = [f"{order['size']:,} windows by seed {order['seed']}" for order in (state, here)]
            raise UserError(
                f"the checkpoint stands in an order of {orders[0]}, this run has {orders[1]}; use that run's data "
                "settings, or start anew from its weights"
            )
        epoch, windows = state["epoch"], state["windows"]
        if windows >= len(self) * self.step:
            epoch, windows = epoch + 1, 0
        self.sampler.set_epoch(epoch)
        self.__dict__.update(_place=(epoch, windows), _resumed=True)
