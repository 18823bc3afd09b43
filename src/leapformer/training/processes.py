"""Processes that share each batch on the CPU: every one finds the gradients of its rows.

A small model's step is thousands of short operations; threads wait for one another in each of them, processes once a
step. The first process alone has the run: optimizer, evaluation, checkpoints. Its helpers read the weights where they
are, in shared memory, and leave their gradients beside them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor, nn

from leapformer.errors import LeapformerError
from leapformer.training.arguments import choose_device, use_bf16
from leapformer.training.recipes import TrainingSection

Batch = Mapping[str, Any]


def process_count(section: TrainingSection) -> int:
    """How many processes a training really has: none without a thread of its own, and one on a GPU."""
    return 1 if choose_device(section) == "cuda" else min(section.processes, torch.get_num_threads())


@contextmanager
def helpers(model: nn.Module, section: TrainingSection) -> Iterator[Helpers | None]:
    """The helpers of a training within the block; None where it has none.

    Raises:
        LeapformerError: the shared memory is too small, or a helper does not start.
    """
    count = process_count(section)
    if count == 1:
        yield None
        return
    started = Helpers(model, count - 1, threads=torch.get_num_threads() // count, bf16=use_bf16(section))
    try:
        yield started
    finally:
        started.close()


class Helpers:
    """Processes that find gradients of a model in this one, for rows that they are given.

    Arguments:
        model: its loss is a sum over rows divided by `num_items_in_batch`; its weights move to shared memory.
        count: how many. threads: torch's, of each. bf16: under bfloat16 autocast.
    """

    def __init__(self, model: nn.Module, count: int, *, threads: int, bf16: bool) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.threads = threads
        context = torch.multiprocessing.get_context("spawn")
        try:
            model.share_memory()
            self.gradients = [[torch.zeros_like(p).share_memory_() for p in self.parameters] for _ in range(count)]
        except RuntimeError as error:
            raise LeapformerError(
                f"training.processes: expected shared memory for {count + 1} times the weights, found too little "
                f"({error}); training.processes=1 needs none"
            ) from error
        # One pool each, because each process has gradients of its own.
        self.pools = [
            ProcessPoolExecutor(1, mp_context=context, initializer=_start, initargs=(model, gradients, threads, bf16))
            for gradients in self.gradients
        ]
        # From here on Ctrl-C and SIGTERM reach this process alone.
        with _told():
            for ready in [pool.submit(os.getpid) for pool in self.pools]:
                ready.result()

    @property
    def parts(self) -> int:
        """In how many parts a batch is divided, with the one of this process."""
        return len(self.pools) + 1

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Within the block torch has as many threads here as in each helper; outside, for the optimizer, all."""
        threads = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def begin(self, batches: Sequence[Batch], num_items: Any) -> list[Future]:
        """Let each helper find the gradients of one batch; a random seed of this process's generator goes with it."""
        seeds = torch.randint(2**62, (len(batches),)).tolist()
        with _told():
            return [
                pool.submit(_find_gradients, batch, num_items, seed)
                for pool, batch, seed in zip(self.pools, batches, seeds, strict=False)
            ]

    def add(self, begun: Sequence[Future]) -> float:
        """Add what `begin` started to the gradients of the model here, and return the sum of the losses."""
        with _told():
            results = [future.result() for future in begun]
        total = 0.0
        for (loss, reached), gradients in zip(results, self.gradients, strict=False):
            total += loss
            for parameter, gradient, there in zip(self.parameters, gradients, reached, strict=True):
                if there:
                    parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad.add_(gradient)
        return total

    def close(self) -> None:
        """End the processes."""
        for pool in self.pools:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _told() -> Iterator[None]:
    """Within the block, a process that is gone is a fault in one line."""
    try:
        yield
    except BrokenProcessPool as error:
        raise LeapformerError(
            "training.processes: one of the processes ended, by a lack of memory or from outside; the same command "
            "goes on from the last checkpoint"
        ) from error


def divide(batch: Batch, parts: int) -> list[dict[str, Any]]:
    """A batch as `parts` batches, or fewer where it has fewer rows: row i goes to part i modulo parts, scalars to all.

    Rows stay as wide as they were; tensors of the first part are views.
    """
    rows = len(batch["labels"])

    def part(number: int) -> dict[str, Any]:
        def take(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.ndim == 0:
                return value
            return value[number::parts].clone() if number else value[number::parts]

        return {name: take(value) for name, value in batch.items()}

    return [part(number) for number in range(min(parts, rows))]


# What a helper has: the model, where its gradients go, and whether it computes under autocast.
_held: tuple[nn.Module, list[Tensor], bool] | None = None


def _start(model: nn.Module, gradients: list[Tensor], threads: int, bf16: bool) -> None:
    global _held
    for stop in (signal.SIGINT, signal.SIGTERM):  # a system that shuts down sends it to every process
        signal.signal(stop, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _held = model.train(), gradients, bf16


def _end_with_parent() -> None:
    """A process that waits for work would never hear that the one which gives it was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _find_gradients(batch: Batch, num_items: Any, seed: int) -> tuple[float, list[bool]]:
    """The loss, and for each parameter whether it has a gradient; the gradients lie where they are shared."""
    assert _held is not None
    model, gradients, bf16 = _held
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(**batch, num_items_in_batch=num_items).loss
    loss.backward()
    found = [p.grad for p in model.parameters() if p.requires_grad]
    for shared, gradient in zip(gradients, found, strict=True):
        if gradient is not None:
            shared.copy_(gradient)
    return loss.item(), [gradient is not None for gradient in found]
