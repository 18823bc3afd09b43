"""Pre-training by filling in masked tokens: what is hidden, the model, the hand-over, and an interrupted run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from leapformer.models import LeapformerConfig, LeapformerForMaskedLM
from leapformer.tasks.lra.dataset import PadCollator
from leapformer.tasks.lra.denoise.task import DenoiseData, Documents, MaskCollator, pretraining_recipe
from leapformer.tasks.lra.preparation import prepare
from leapformer.tasks.registry import get_task, load_recipe
from leapformer.training.callbacks import Stop
from leapformer.training.loading import load_model
from leapformer.training.recipes import RecipeError
from leapformer.training.run import Run
from leapformer.training.train import train
from tests.tasks.lra.builders import spread

TINY = (
    "hidden_size=16", "intermediate_size=32", "classifier_hidden_size=8", "log_every=1", "eval_every=2", "save_every=2",
    "eval_tokens=600", "batch_size=4", "max_steps=2", "warmup_steps=1", "pretrain=denoise", "pretrain_steps=4",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("denoise")
    prepare("listops", folder / "listops", count=40, workers=1, min_length=20, max_length=60)
    return folder


def tiny(data, *overrides):
    return load_recipe("lra/listops-cpu", [f"data.path={data / 'listops'}", *TINY, *overrides])


def items(lengths, seed=0):
    generator = np.random.default_rng(seed)
    return [{"input_ids": generator.integers(1, 9, n), "label": 0, "index": i} for i, n in enumerate(lengths)]


def test_only_real_tokens_are_hidden_and_labels_are_what_was_hidden():
    given = items((400, 150, 1))
    batch = MaskCollator(PadCollator(0), share=0.3, mask_id=9, seed=1)(given)
    hidden = batch["labels"] != -100
    assert torch.equal(batch["input_ids"] == 9, hidden)
    assert not (hidden & (batch["attention_mask"] == 0)).any()
    whole = torch.where(hidden, batch["labels"], batch["input_ids"])
    for row, item in enumerate(given):
        assert whole[row, : len(item["input_ids"])].tolist() == item["input_ids"].tolist()
    share = hidden.sum().item() / 551
    assert abs(share - 0.3) < spread(0.3, 551)


def test_masks_depend_on_the_batch_and_the_seed_alone():
    def labels(given, seed=1):
        torch.rand(3)  # other random numbers make no difference
        return MaskCollator(PadCollator(0), share=0.5, mask_id=9, seed=seed)(given)["labels"]

    given = items((64, 64))
    again = [dict(item, index=item["index"] + 2) for item in given]
    assert torch.equal(labels(given), labels(given))
    assert not torch.equal(labels(given), labels(again)) and not torch.equal(labels(given), labels(given, seed=2))


def test_both_documents_of_a_pair(tmp_path):
    class Pairs:
        two_documents = True

        def __len__(self):
            return 2

        def __getitem__(self, row):
            return {"input_ids": np.array([row]), "input_ids_1": np.array([10 + row]), "label": 1}

    found = [item["input_ids"].item() for item in (Documents(Pairs())[i] for i in range(4))]
    assert found == [0, 10, 1, 11]


@pytest.mark.parametrize("pooling", ("mean", "cls"))
def test_loss_and_logits_of_the_masked_tokens(pooling):
    config = LeapformerConfig(vocab_size=12, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, pooling=pooling)
    model = LeapformerForMaskedLM(config).double().eval()
    ids = torch.randint(0, 12, (2, 9))
    labels = torch.where(torch.rand(2, 9) < 0.5, ids, -100)
    labels[0, 0] = 3
    every = model(ids).logits
    assert every.shape == (2, 9, 12)
    found = model(ids, labels=labels)
    asked = labels != -100
    torch.testing.assert_close(found.logits, every[asked], rtol=0, atol=1e-12)
    torch.testing.assert_close(found.loss, F.cross_entropy(every[asked], labels[asked]))
    assert model(ids, labels=torch.full_like(ids, -100)).loss == 0
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_run_goes_on_from_the_pretrained_encoder(data, tmp_path):
    recipe, task = tiny(data, "learning_rate=1e-12")  # so small that the training itself moves nothing
    outcome = train(recipe, task, tmp_path / "run")
    assert outcome.results is not None
    before = outcome.results["pretraining"]
    metrics = before["splits"]["validation"]
    assert before["steps"] == 4 and 0 <= metrics["accuracy"] <= 1 and 0 < metrics["majority_accuracy"] < 1
    pretrained, model = (load_model(tmp_path / "run" / part / "model") for part in ("pretraining", "."))
    assert isinstance(pretrained, LeapformerForMaskedLM)
    mine, theirs = model.model.state_dict(), pretrained.model.state_dict()
    assert theirs["embed_tokens.weight"].shape[0] == mine["embed_tokens.weight"].shape[0] + 1
    for name, weight in mine.items():
        torch.testing.assert_close(weight, theirs[name][: len(weight)], rtol=0, atol=1e-9)


def test_an_interrupted_pretraining_goes_on_to_the_same_weights(data, tmp_path, monkeypatch):
    recipe, task = tiny(data)
    whole = train(recipe, task, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "on_step_end", stop_after_three)
        stopped = train(recipe, task, tmp_path / "run")
    assert stopped.results is None and not Run(tmp_path / "run").finished
    resumed = train(recipe, task, tmp_path / "run")
    assert whole.results is not None and resumed.results is not None
    for part in ("pretraining", "."):
        a, b = (load_model(tmp_path / name / part / "model").state_dict() for name in ("whole", "run"))
        assert all(torch.equal(a[name], b[name]) for name in a)


def stop_after_three(self, args, state, control, **keywords):
    if state.global_step == 3:
        control.should_training_stop = control.should_save = True
    return control


def test_recipe_of_the_pretraining(data):
    recipe, _ = tiny(data, "pretrain_learning_rate=5e-4", "mask_share=0.4")
    first = pretraining_recipe(recipe)
    assert (first.task, first.pretrain, first.training.max_steps) == ("lra-denoise", "none", 4)
    assert first.training.learning_rate == 5e-4 and first.training.warmup_steps == 0
    assert get_task("lra-denoise").pretraining(first) is None
    prepared = DenoiseData(first)
    batch = prepared.collator([prepared.train_dataset[i] for i in range(30)])
    real = int(batch["attention_mask"].sum())
    assert abs(prepared.count_targets(batch) / real - 0.4) < spread(0.4, real)


def test_the_commonest_symbol_is_counted(data):
    prepared = DenoiseData(pretraining_recipe(tiny(data)[0]))

    def tokens(split):
        dataset = prepared.split(split)
        return [int(t) for i in range(len(dataset)) for t in dataset[i]["input_ids"]]

    train_tokens, test_tokens = tokens("train"), tokens("test")
    commonest = max(range(1, 20), key=train_tokens.count)
    assert prepared.baselines("test")["majority_accuracy"] == test_tokens.count(commonest) / len(test_tokens)


def test_wrong_values_are_faults(data):
    with pytest.raises(RecipeError) as caught:
        tiny(data, "pretrain=denoising", "mask_share=1.5")
    assert len(caught.value.faults) == 2
    assert json.dumps(caught.value.faults).count("expected") == 2
