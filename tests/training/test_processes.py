"""Processes that share each batch: the same gradients, runs that resume, and ends that leave nothing behind."""

from __future__ import annotations

import os
import signal
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch
from transformers import PreTrainedModel

from leapformer.errors import LeapformerError
from leapformer.models import LeapformerConfig, LeapformerForSequenceClassification, LeapformerTranslationConfig
from leapformer.models.translation import LeapformerForConditionalGeneration
from leapformer.training.processes import Helpers, divide, helpers, process_count
from leapformer.training.recipes import TrainingSection
from leapformer.training.run import Run
from leapformer.training.train import train

from .builders import tiny_recipe
from .test_train import interrupt_at, last_weights, losses


def translation_model() -> PreTrainedModel:
    config = LeapformerTranslationConfig(
        source="text", source_vocab_size=20, vocab_size=20, hidden_size=16, intermediate_size=16, num_attention_heads=2,
        encoder_layers=1, decoder_layers=1, ctc_weight=0.0, hidden_dropout=0.0,
    )  # fmt: skip
    return LeapformerForConditionalGeneration(config).double()


def ragged_batch(rows: int) -> dict:
    """Sources and targets of 2 to 6 tokens, and the k of each row."""
    torch.manual_seed(rows)
    lengths = torch.randint(2, 7, (2, rows))
    real = torch.arange(6) < lengths[..., None]
    return {
        "input_ids": torch.randint(3, 20, (rows, 6)) * real[0],
        "attention_mask": real[0].long(),
        "labels": torch.randint(3, 20, (rows, 6)).masked_fill(~real[1], -100),
        "k": torch.randint(0, 4, (rows,)),
    }


def gradients_of(model: PreTrainedModel) -> dict[str, torch.Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def shared():
    """A model in float64 with one parameter that its loss does not reach, and two helpers."""
    torch.manual_seed(0)
    model = translation_model()
    model.register_parameter("idle", torch.nn.Parameter(torch.ones(3)))
    started = Helpers(model, 2, threads=1, bf16=False)
    yield model, started
    started.close()


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_divided_gradients_are_those_of_the_whole_batch(shared, rows):
    """Sums of the same terms in another order: 1e-12 is some thousand roundings of values near 1."""
    model, started = shared
    batch = ragged_batch(rows)
    items = (batch["labels"] != -100).sum()
    with torch.no_grad():
        for parameter in model.parameters():  # as an optimizer does it
            parameter.mul_(0.99)
    model.zero_grad()
    whole = model(**batch, num_items_in_batch=items).loss
    whole.backward()
    expected = gradients_of(model)
    model.zero_grad()
    own, *others = divide(batch, started.parts)
    assert len(others) == min(rows, 3) - 1
    begun = started.begin(others, items)
    loss = model(**own, num_items_in_batch=items).loss
    loss.backward()
    total = loss.item() + started.add(begun)
    assert total == pytest.approx(whole.item(), abs=1e-6)  # a helper's loss comes as a Python float
    found = gradients_of(model)
    assert expected["idle"] is None and found["idle"] is None
    for name, gradient in expected.items():
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-12)


def test_gradients_of_accumulated_batches_add_up(shared):
    model, started = shared
    batch = divide(ragged_batch(2), 2)[0]
    model.zero_grad()
    started.add(started.begin([batch, batch], 4))
    once = gradients_of(model)
    started.add(started.begin([batch, batch], 4))
    for name, gradient in gradients_of(model).items():
        if gradient is not None:
            torch.testing.assert_close(gradient, 2 * once[name], rtol=1e-12, atol=1e-12)


def test_a_fault_of_a_helper_is_the_callers(shared):
    model, started = shared
    with pytest.raises(ValueError, match="expected labels or decoder_input_ids"):
        started.add(started.begin([{"input_ids": torch.ones(1, 2, dtype=torch.int64)}], 1))


def test_every_row_goes_to_one_part():
    batch = {"labels": torch.arange(7), "k": None, "scale": torch.tensor(3.0)}
    parts = divide(batch, 3)
    assert [part["labels"].tolist() for part in parts] == [[0, 3, 6], [1, 4], [2, 5]]
    assert all(part["k"] is None and part["scale"] == 3 for part in parts)
    assert len(divide({"labels": torch.arange(2)}, 3)) == 2


def test_a_classifier_divides_by_the_examples_of_the_batch():
    model = LeapformerForSequenceClassification(LeapformerConfig(hidden_size=16, num_hidden_layers=1, num_labels=3))
    ids, labels = torch.randint(3, 9, (5, 4)), torch.tensor([0, 1, 2, 1, 0])
    model.eval()
    whole = model(ids, labels=labels).loss
    parts = [model(ids[i::2], labels=labels[i::2], num_items_in_batch=5).loss for i in range(2)]
    torch.testing.assert_close(sum(parts), whole)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(before)


def test_a_shared_run_resumes_to_the_same_weights(tmp_path, monkeypatch, two_threads):
    """With dropout, whose draws in the helper come from the first process's generator."""
    recipe, task = tiny_recipe(tmp_path, "processes=2", "seed=1", "accumulation=2", "batch_size=3")
    outcome = train(recipe, task, tmp_path / "whole")
    assert outcome.results is not None and outcome.results["processes"] == 2
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        assert train(recipe, task, tmp_path / "parts").results is None
    assert train(recipe, task, tmp_path / "parts").results is not None
    whole, parts = last_weights(tmp_path / "whole"), last_weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert torch.get_num_threads() == two_threads
    alone, _ = tiny_recipe(tmp_path, "seed=1", "accumulation=2", "batch_size=3")
    assert alone.fingerprint == recipe.fingerprint
    assert Run(tmp_path / "whole").results()["recipe_fingerprint"] == alone.fingerprint


def test_processes_are_at_most_the_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    section = TrainingSection(processes=4, device="cpu")
    assert process_count(section) == 1
    with helpers(torch.nn.Linear(1, 1), section) as none:
        assert none is None


def test_a_helper_that_ends_is_told_in_one_line(tmp_path):
    model = translation_model()
    started = Helpers(model, 1, threads=1, bf16=False)
    (pid,) = [process.pid for process in started.pools[0]._processes.values()]
    os.kill(pid, signal.SIGINT)  # Ctrl-C is not for it
    assert started.add(started.begin([ragged_batch(2)], 1)) > 0
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(LeapformerError, match="training.processes: one of the processes ended") as caught:
        for _ in range(2):  # the pool notices with one of them
            started.add(started.begin([ragged_batch(2)], 1))
    assert isinstance(caught.value.__cause__, BrokenProcessPool) and "\n" not in str(caught.value)
    started.close()
