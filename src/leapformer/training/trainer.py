"""A thin subclass of the Hugging Face Trainer: data order, loss normalisation, evaluation and saving are ours."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from leapformer.files.writing import staged_folder, write_json
from leapformer.training.arguments import build_optimizer, build_schedule
from leapformer.training.processes import Helpers, divide
from leapformer.training.recipes import TrainingSection
from leapformer.training.run import Run, checkpoint_step
from leapformer.training.task import TaskData

PROGRESS_NAME = "progress.json"


class PassSampler(Sampler[int]):
    """Indices of a data set in random passes, one after the other, `total` in all.

    The order depends on the seed and the size alone, never on what else draws random numbers, so it is the same for
    every model. Batches run across the ends of passes, so each has the full size.

    Arguments:
        size: of the data set. total: indices to give.
        lengths: of every example; then each `batch` indices in a row are of about one length: a pass is cut into stretches of
            `STRETCH` batches, each is sorted by length, and its batches come in random order.
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
        super().__init__(
            model=model,
            args=args,
            data_collator=data.collator,
            train_dataset=data.train_dataset,
            eval_dataset=data.train_dataset,  # never read: evaluate() below asks the task
            callbacks=[self.clock, LastStep(), *callbacks],
        )
        self.remove_callback(PrinterCallback)
        if section.gradient_checkpointing:
            # transformers renamed it on the way from 5.17 to 5.23.
            old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"
            getattr(self.model, new if hasattr(self.model, new) else old)()

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        args = self.args
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return PassSampler(
            len(self.data.train_dataset),  # type: ignore[arg-type]
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
            count = self.accelerator.gather(count).sum()  # type: ignore[union-attr]
        self.targets_seen += int(count)
        return batches, count if self.model_accepts_loss_kwargs else None

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Loss and gradients of a batch, with the helpers where there are some."""
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

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Metrics on a part of the validation set; the best model so far is saved for use."""
        metrics = {f"eval_{name}": value for name, value in self.data.quick_metrics(self.unwrapped).items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
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

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Weights, configuration and a tokenizer where there is one; not the pickled arguments that the Trainer adds."""
        self.unwrapped.save_pretrained(output_dir, state_dict=state_dict)
        if self.data.tokenizer is not None:
            self.data.tokenizer.save_pretrained(str(output_dir))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Everything to resume from, written beside the checkpoints before and renamed when it is whole."""
        step = self.state.global_step
        target = self.run.checkpoints_path / f"checkpoint-{step}"
        with staged_folder(target) as folder:
            self._save(str(folder))
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            self.state.save_to_json(str(folder / "trainer_state.json"))
            write_json(folder / PROGRESS_NAME, {"targets": self.targets_seen, "seconds": self.clock.seconds})
        self.remove_old_checkpoints()

    def remove_old_checkpoints(self) -> None:
        """Keep the newest checkpoints, as many as the recipe says."""
        for checkpoint in self.run.checkpoints()[: -self.section.keep_checkpoints]:
            shutil.rmtree(checkpoint)

    def resume(self, checkpoint: Path) -> None:
        """Take up the counts of a checkpoint; the Trainer itself restores the rest when it trains."""
        progress = json.loads((checkpoint / PROGRESS_NAME).read_text(encoding="utf-8"))
        self.targets_seen = progress["targets"]
        self.clock.seconds = progress["seconds"]
        self.run.rewind(checkpoint_step(checkpoint))


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


class LastStep(TrainerCallback):
    """Evaluates and saves at the last step, whatever the intervals."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = control.should_evaluate = control.should_save = True
