"""Callbacks: the metrics file, TensorBoard, the progress bar, and a stop that leaves a checkpoint."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from leapformer.training import ranks
from leapformer.training.run import Run


class MetricsFile(TrainerCallback):
    """Appends what the Trainer logs to metrics.jsonl and to TensorBoard.

    Arguments:
        run: the folder of the run.
        progress: returns the targets (tokens, examples) and the seconds of training so far.
        unit: what the targets are called.
    """

    def __init__(self, run: Run, progress: Callable[[], tuple[int, float]], unit: str = "tokens") -> None:
        self.run = run
        self.progress = progress
        self.unit = unit
        self.writer: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.run.tensorboard_path), purge_step=state.global_step + 1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or not state.is_world_process_zero or "train_runtime" in logs:
            return
        targets, seconds = self.progress()
        values = {name: value for name, value in logs.items() if name != "epoch"}
        self.run.log({"step": state.global_step, **values, self.unit: targets, "seconds": round(seconds, 3)})
        if self.writer is not None:
            for name, value in values.items():
                if name == "loss_steps":
                    continue
                group = "eval" if name.startswith("eval_") else "train"
                self.writer.add_scalar(f"{group}/{name.removeprefix('eval_')}", value, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Write what TensorBoard has not yet got; also for a training that ends with an error."""
        if self.writer is not None:
            self.writer.close()


def passing_bar(items: Sequence[int], what: str) -> Iterable[int]:
    """The items under a bar on the error stream that goes when they are through; see ``TaskData.progress``."""
    from tqdm import tqdm

    seldom = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(items, desc=what, leave=False, dynamic_ncols=True, mininterval=seldom)


class ProgressBar(TrainerCallback):
    """A bar of the steps on the error stream, with the last losses and the speed.

    Arguments:
        label: what is trained.
        progress: returns the targets (tokens, examples) and the seconds of training so far.
        unit: what the targets are called.
    """

    def __init__(self, label: str, progress: Callable[[], tuple[int, float]], unit: str = "tokens") -> None:
        self.label = label
        self.progress = progress
        self.unit = unit
        self.bar: Any = None
        self.shown: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        from tqdm import tqdm

        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.label,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        names = {"loss": "loss", "eval_loss": "validation"}
        self.shown.update({names[key]: f"{value:.3f}" for key, value in (logs or {}).items() if key in names})
        targets, seconds = self.progress()
        if seconds:
            self.shown[f"{self.unit}/s"] = f"{targets / seconds:,.0f}"
        if self.bar is not None:
            self.bar.set_postfix(self.shown, refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the bar as it is and go to the next line; also for a training that ends with an error."""
        if self.bar is not None:
            self.bar.close()


class Stop(TrainerCallback):
    """Ends the training with a checkpoint after the step in which it was asked for, in all ranks after the same one.

    Attributes:
        requested: whether it was asked for.
        signal: that which asked for it, such as signal.SIGINT, if it was one.
    """

    def __init__(self) -> None:
        self.requested = False
        self.signal: int | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        asked = ranks.any_of(self.requested, args.device)
        if asked and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True


STOPS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C; what a system sends before it kills


@contextmanager
def interruptible(stop: Stop) -> Iterator[None]:
    """Within the block, Ctrl-C and SIGTERM ask for a stop with a checkpoint; a second one breaks off at once.

    Only the main thread can do that; elsewhere the block changes nothing.
    """

    def request(number: int, frame: Any) -> None:
        stop.requested, stop.signal = True, number
        restore()

    def restore() -> None:
        for each, handler in previous.items():
            signal.signal(each, signal.SIG_DFL if handler is None else handler)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {each: signal.signal(each, request) for each in STOPS}
    try:
        yield
    finally:
        restore()
