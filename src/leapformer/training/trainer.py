"""A thin subclass of the Hugging Face Trainer: data order, loss normalisation, evaluation and saving are ours."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from leapformer.errors import LeapformerError
from leapformer.files.records import ProgressRecord, read_progress
from leapformer.files.writing import STAGING_PREFIX, staged_folder, write_json
from leapformer.training import ranks
from leapformer.training.arguments import build_optimizer, build_schedule
from leapformer.training.processes import Helpers, divide
from leapformer.training.recipes import TrainingSection
from leapformer.training.restoring import (
    check_random_state,
    load_optimizer,
    load_schedule,
    load_weights,
)
from leapformer.training.run import OPTIMIZER, PROGRESS, SCHEDULE, TRAINER_STATE, Run, checkpoint_step
from leapformer.training.saving import WEIGHTS, seal
from leapformer.training.task import TaskData


class TrainingDiverged(LeapformerError):
    """A loss, a gradient or a weight of a training is no finite number."""


class PassSampler(Sampler[int]):
    """Indices of a data set in random passes, one after the other, `total` in all.

    The order depends on the seed and the size alone, never on what else draws random numbers, so it is the same for
    every model. Batches run across the ends of passes, so each has the full size.

    Arguments:
        size: of the data set. total: indices to give.
        lengths: of every example; then each `batch` indices in a row are of about one length: a pass is cut into
            stretches of `STRETCH` batches, each is sorted by length, and its batches come in random order.
        batch: examples of a batch; needed with lengths.
    """

    STRETCH = 50

    def __init__(
        self, size: int, *, total: int, seed: int, lengths: Sequence[int] | None = None, batch: int = 1
    ) -> None:
        self.size = size
        self.total = total
        self.seed = seed
        self.lengths = None if lengths is None else torch.tensor(lengths)
        self.batch = batch

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        if self.lengths is None:
            yield from islice(self._passes(generator), self.total)
            return
        passes, left = self._passes(generator), self.total
        while left > 0:
            stretch = torch.tensor(list(islice(passes, min(left, self.STRETCH * self.batch))))
            left -= len(stretch)
            batches = stretch[self.lengths[stretch].argsort(stable=True)].split(self.batch)
            for number in torch.randperm(len(batches), generator=generator).tolist():
                yield from batches[number].tolist()

    def _passes(self, generator: torch.Generator) -> Iterator[int]:
        while True:
            yield from torch.randperm(self.size, generator=generator).tolist()


class LeapformerTrainer(Trainer):
    """Trains one model of one run.

    Arguments:
        model: the model with its first weights.
        data: the prepared data of the task.
        section: the section `training` of the recipe.
        run: the folder to write to.
        args: what `training_arguments` returned.
        callbacks: further callbacks, such as a progress bar.
        helpers: processes that share each batch; None: this one does all.
    """

    def __init__(
        self,
        *,
        model: Any,
        data: TaskData,
        section: TrainingSection,
        run: Run,
        args: TrainingArguments,
        callbacks: list[TrainerCallback],
        helpers: Helpers | None = None,
    ) -> None:
        self.data = data
        self.helpers = helpers
        self.section = section
        self.run = run
        self.targets_seen = 0
        self.clock = StepClock()
        self._resumed: ProgressRecord | None = None
        self._losses: list[torch.Tensor] = []  # of the forward passes of this step
        self._row_begins = 0  # the step after which the next row of losses begins
        super().__init__(
            model=model,
            args=args,
            data_collator=data.collator,
            train_dataset=data.train_dataset,
            eval_dataset=data.train_dataset,  # never read: evaluate() below asks the task
            callbacks=[self.clock, LastStep(), AveragesGoOn(self), *callbacks],
        )
        self.remove_callback(PrinterCallback)
        if section.gradient_checkpointing:
            # transformers renamed it on the way from 5.17 to 5.23.
            old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"
            getattr(self.model, new if hasattr(self.model, new) else old)()

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        args = self.args
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        examples: Any = self.data.train_dataset  # torch's Dataset declares no length
        return PassSampler(
            len(examples),
            total=args.max_steps * per_step,
            seed=args.seed,
            lengths=self.data.train_lengths,
            batch=args.train_batch_size,
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            target: Any = self.model if model is None else model
            self.optimizer = build_optimizer(target, self.section)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            self.lr_scheduler = build_schedule(self.optimizer if optimizer is None else optimizer, self.section)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, Any]:
        """The batches of one step and the number of targets; the Trainer's own count differs between versions."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        count = torch.tensor(sum(self.data.count_targets(batch) for batch in batches), device=device)
        if self.args.world_size > 1:
            gathered: Any = self.accelerator.gather(count)  # as the structure that was given
            count = gathered.sum()
        self.targets_seen += int(count)
        return batches, count if self.model_accepts_loss_kwargs else None

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Loss and gradients of a batch, with the helpers where there are some."""
        loss = self._loss_and_gradients(model, inputs, num_items_in_batch)
        self._losses.append(loss.detach())
        return loss

    def _loss_and_gradients(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> torch.Tensor:
        if self.helpers is None:
            return super().training_step(model, inputs, num_items_in_batch)
        own, *others = divide(inputs, self.helpers.parts)
        with self.helpers.at_work():
            begun = self.helpers.begin(others, num_items_in_batch)
            loss = super().training_step(model, own, num_items_in_batch)
            return loss + self.helpers.add(begun)

    def _clip_grad_norm(self, model: Any) -> Any:
        if self.section.clip_values:
            torch.nn.utils.clip_grad_value_(model.parameters(), self.section.clip_values)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The Trainer asks for it once a step, between the gradients and what the optimizer makes of them."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._check_step(norm)
        return norm

    def _check_step(self, norm: Any) -> None:
        """Stop before the weights are touched where the loss or the gradient of this step is no finite number.

        Where losses are scaled for float16, a gradient that overflows only makes the scale smaller.
        """
        loss = torch.stack(self._losses).sum()
        self._losses.clear()
        scaled = getattr(self.accelerator, "scaler", None) is not None
        watched = [loss] if scaled or norm is None else [loss, torch.as_tensor(norm, device=loss.device)]
        healthy = bool(torch.stack([value.detach().float() for value in watched]).isfinite().all())
        if ranks.any_of(not healthy, loss.device):
            found = {"loss": float(loss), "grad_norm": math.nan if norm is None else float(norm)}
            raise self._diverged(self.state.global_step + 1, found)

    def _check_weights(self) -> None:
        """Weights can overflow in a step whose loss and gradient were finite: not to be saved or evaluated."""
        weights = self.unwrapped.parameters()
        if not torch.stack([weight.detach().isfinite().all() for weight in weights]).all():
            raise self._diverged(self.state.global_step, {"weights": math.nan})

    def _diverged(self, step: int, found: Mapping[str, float]) -> TrainingDiverged:
        """Log what was found, and say it with what usually helps and what is left."""
        rate = self._get_learning_rate()
        if ranks.is_first():
            counts = {self.data.unit: self.targets_seen, "seconds": round(self.clock.seconds, 3)}
            self.run.log({"step": step, "diverged": True, **found, "learning_rate": rate, **counts})
        names = {"loss": "the loss", "grad_norm": "the norm of the gradient", "weights": "a weight"}
        bad = next(f"{names[key]} is {value}" for key, value in found.items() if not math.isfinite(value))
        helps = "a smaller learning_rate, more warmup_steps or a smaller clip usually helps" + (
            ", or bf16=false" if self.args.bf16 else ""
        )
        if step == 1 and "weights" not in found:
            helps = "no step came before it, so look at the data and the model"
        saved = self.run.checkpoints()
        left = [saved[-1].name] if saved else []
        if self.state.best_global_step:
            left.append(f"the best model (of step {self.state.best_global_step})")
        kept = f"; {' and '.join(left)} {'is' if len(left) == 1 else 'are'} as before" if left else ""
        return TrainingDiverged(
            f"{self.run.path}: training diverged in step {step} of {self.state.max_steps}: {bad} at "
            f"learning rate {rate:.3g}; {helps}{kept}"
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """A loss is a mean over some steps; say over how many."""
        if "loss" in logs:
            logs["loss_steps"] = self.state.global_step - self._row_begins
            self._row_begins = self.state.global_step
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Metrics on a part of the validation set; the best model so far is saved for use."""
        self._check_weights()
        metrics = {f"eval_{name}": value for name, value in self.data.quick_metrics(self.unwrapped).items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        if not math.isfinite(metrics["eval_loss"]):
            return False
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best:
            self.save_best()
        return is_best

    @property
    def unwrapped(self) -> Any:
        """The model without what compilation or several devices put around it."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def save_best(self) -> None:
        """Write the present model to the run's `model` folder, in place of the one before."""
        if self.args.should_save:
            with staged_folder(self.run.model_path) as folder:
                self._save(str(folder))
                seal(folder)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Weights, configuration and a tokenizer where there is one; no pickled arguments, as the Trainer has them."""
        self.unwrapped.save_pretrained(output_dir, state_dict=state_dict)
        if self.data.tokenizer is not None:
            self.data.tokenizer.save_pretrained(str(output_dir))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Everything to resume from, written beside the checkpoints before and renamed when it is whole."""
        self._check_weights()
        loss_sum = ranks.mean(self._tr_loss)
        target = self.run.checkpoints_path / f"checkpoint-{self.state.global_step}"
        with self._shared_folder(target) as folder:
            if self.args.should_save:
                self._save(str(folder))
                self._save_optimizer_and_scheduler(str(folder))
                self._save_scaler(str(folder))
                write_json(folder / TRAINER_STATE, dict(sorted(asdict(self.state).items())))
                steps = self.state.global_step - self._globalstep_last_logged
                progress = {"targets": self.targets_seen, "seconds": self.clock.seconds}
                write_json(folder / PROGRESS, {**progress, "loss_sum": loss_sum, "loss_steps": steps})
            self._save_rng_state(str(folder))
        if self.args.should_save:
            self.remove_old_checkpoints()

    @contextmanager
    def _shared_folder(self, target: Path) -> Iterator[Path]:
        """A `staged_folder` of the first rank, into which every rank writes; sealed when all have done so."""
        if not self.args.should_save:
            ranks.meet()
            yield target.with_name(f"{STAGING_PREFIX}{target.name}")
            ranks.meet()
            return
        with staged_folder(target) as folder:
            ranks.meet()
            yield folder
            ranks.meet()
            seal(folder)

    def remove_old_checkpoints(self) -> None:
        """Keep the newest checkpoints, as many as the recipe says."""
        for checkpoint in self.run.checkpoints()[: -self.section.keep_checkpoints]:
            shutil.rmtree(checkpoint)

    def resume(self, checkpoint: Path) -> None:
        """Take up the counts of a checkpoint; the rest is restored when the training begins."""
        self._resumed = read_progress(checkpoint / PROGRESS)
        self.targets_seen = self._resumed.targets
        self.clock.seconds = self._resumed.seconds

    def go_on_averaging(self) -> None:
        """The next row of metrics averages over the steps before the checkpoint too, as without the stop."""
        if self._resumed is not None and self._resumed.loss_sum is not None:
            self._tr_loss += self._resumed.loss_sum
            self._globalstep_last_logged -= self._resumed.loss_steps or 0
        self._row_begins = self._globalstep_last_logged

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoint = Path(resume_from_checkpoint)
        with self.run.resuming(checkpoint):
            load_weights(self.unwrapped if model is None else model, checkpoint / WEIGHTS)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder, optimizer = Path(checkpoint), self.optimizer
        with self.run.resuming(folder):
            # accelerate wraps it
            load_optimizer(getattr(optimizer, "optimizer", optimizer), folder / OPTIMIZER)
            load_schedule(self.lr_scheduler, folder / SCHEDULE, step=checkpoint_step(folder))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        name = f"rng_state_{self.args.process_index}.pth" if self.args.world_size > 1 else "rng_state.pth"
        with self.run.resuming(folder):
            check_random_state(folder / name)
            try:
                super()._load_rng_state(checkpoint)
            except (TypeError, ValueError, KeyError, RuntimeError, OverflowError) as error:
                raise LeapformerError(f"{folder / name}: expected the states of generators ({error})") from error


class StepClock(TrainerCallback):
    """Seconds spent in training steps, without evaluation and saving."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started: float | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._started is not None:
            self.seconds += time.perf_counter() - self._started
        self._started = None


class AveragesGoOn(TrainerCallback):
    """Takes up the sum of losses of a checkpoint, which the Trainer itself begins anew when it resumes."""

    def __init__(self, trainer: LeapformerTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.go_on_averaging()


class LastStep(TrainerCallback):
    """Evaluates and saves at the last step, whatever the intervals."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = control.should_evaluate = control.should_save = True
