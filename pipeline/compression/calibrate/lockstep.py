"""All batches of a calibration through one network, side by side: none goes past a layer before all have reached it.

A layer can be solved only when all data has reached it, and only then may anything be computed behind it. Each batch
is a forward pass in a thread of its own, for a forward cannot be left and entered again in any other way. Only one
thread runs at any time, so threads change neither speed nor order; a pass over all batches costs what one forward of
all samples costs. Every waiting forward keeps in memory what it holds at the layer where it waits.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from contextvars import copy_context
from functools import partial
from threading import Semaphore, Thread
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.compression.calibrate.batches import Batches
from pipeline.example import Example, call_arguments
from pipeline.tables import UserError

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
DEVICES = ("cpu", "cuda")  # whose autocast is carried into threads


class Done(BaseException):
    """Ends a forward pass early. It is no Exception, so that a forward that catches Exception does not go on."""


class Stop(NamedTuple):
    """A forward that has reached a module: the name by which it is watched, the module, and what it is called with."""

    name: str
    layer: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def x(self) -> Tensor:
        """The first argument: the input of a layer."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()))


@contextmanager
def watched(layers: Mapping[str, nn.Module], at: Callable[[Stop], None]) -> Iterator[None]:
    """Within, `at` is called before every call of these layers."""

    def told(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        at(Stop(name, layer, args, kwargs))

    handles = [layer.register_forward_pre_hook(partial(told, n), with_kwargs=True) for n, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def forward(model: nn.Module, example: Example) -> None:
    """Run a forward pass to its end, or until a watcher raises `Done`."""
    args, kwargs = call_arguments(example)
    with suppress(Done):
        model(*args, **kwargs)


def one_by_one(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Batches, arrive: Callable[[int, Stop], None]
) -> None:
    """Run each batch through the network up to the last of `layers`, which stand in the order of their calls.

    arrive(i, stop): batch i has reached a layer. Raises UserError for a forward in another order.
    """
    order = list(layers)
    for i, batch in enumerate(batches):
        due = iter(order)

        def at(stop: Stop, i: int = i, due: Iterator[str] = due) -> None:
            check_order(next(due), stop)
            arrive(i, stop)
            if stop.name == order[-1]:
                raise Done

        with watched(layers, at):
            forward(model, batch)
        if missing := next(due, None):
            check_order(missing, None)


def in_lockstep(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Batches,
    arrive: Callable[[int, Stop], None],
    leave: Callable[[str], None],
) -> None:
    """Run all batches, side by side, up to the last of `layers`, which stand in the order of their calls.

    arrive(i, stop): batch i has reached a layer. leave(name): all batches have reached it, and go on afterwards; it may
    call the layer. Raises UserError for a forward in another order.
    """
    running: Run | None = None

    def at(stop: Stop) -> None:
        if running is not None:  # None while `leave` calls a layer itself
            running.wait(stop)

    runs: list[Run] = []
    try:
        with watched(layers, at):
            for batch in batches:
                runs.append(Run(partial(forward, model, batch)))
            for name in layers:
                for i, running in enumerate(runs):
                    arrive(i, check_order(name, running.go()))
                running = None
                leave(name)
    finally:
        for run in runs:
            run.close()


def check_order(due: str, found: Stop | None) -> Stop:
    """Raise UserError where a forward is not at the layer that is due; found: None at its end."""
    if found is None or found.name != due:
        other = f"calls {found.name}" if found is not None else "ends"
        raise UserError(
            f"the forward {other} where other batches call {due}: calibration needs a network that calls its layers "
            "in one order whatever it is given (leave that part out with protect=)"
        )
    return found


class Run:
    """Work in a thread of its own, which stops where it calls `wait` until `go` is called.

    The thread starts with the thread-local state of the thread that made the Run: torch's modes of gradients, autocast
    and stream, and context variables.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self._stop: Stop | None = None
        self._error: BaseException | None = None
        self._over = False
        self._turn, self._back = Semaphore(0), Semaphore(0)
        self._thread = Thread(target=copy_context().run, args=(self._run, work, thread_state()), daemon=True)
        self._thread.start()

    def go(self) -> Stop | None:
        """Run to the next `wait` and return its Stop; None: the work has ended. Raises what the work raises."""
        self._stop = None
        self._turn.release()
        self._back.acquire()
        trim()
        if self._error is not None:
            raise self._error
        return self._stop

    def wait(self, stop: Stop) -> None:
        """Stop here until the next `go`; called by the work itself."""
        self._stop = stop
        self._back.release()
        self._turn.acquire()
        if self._over:
            raise Done

    def close(self) -> None:
        """End the work where it waits."""
        self._over = True
        self._turn.release()
        self._thread.join()

    def _run(self, work: Callable[[], None], entered: Callable[[], ExitStack]) -> None:
        self._turn.acquire()
        try:
            if not self._over:
                with entered():
                    work()
        except BaseException as error:  # raised again in the thread that waits for it
            self._error = error
        finally:
            self._back.release()


def trim() -> None:
    """Return free memory to the system. glibc keeps it for the thread that freed it, where no other can use it."""
    if LIBC is not None and hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)


def thread_state() -> Callable[[], ExitStack]:
    """A function that gives another thread torch's thread-local state, as it is in this thread."""
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    casts = [(d, torch.get_autocast_dtype(d), torch.is_autocast_enabled(d)) for d in DEVICES]
    cached = torch.is_autocast_cache_enabled()
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    def entered() -> ExitStack:
        stack = ExitStack()
        stack.enter_context(torch.inference_mode(inference))
        stack.enter_context(torch.set_grad_enabled(grad))
        for device, dtype, enabled in casts:
            if enabled:
                stack.enter_context(torch.autocast(device, dtype, cache_enabled=cached))
        if stream is not None:
            stack.enter_context(torch.cuda.stream(stream))
        return stack

    return entered
