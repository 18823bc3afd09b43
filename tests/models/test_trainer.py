"""The stock Trainer, pipelines and collators of transformers, where they decide by names, labels and signatures."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from leapformer.models import LeapformerForMaskedLM, LeapformerForSequenceClassification
from tests.models.builders import tiny_config, tiny_model, tokens
from tests.models.test_peft import METHODS
from tests.models.translation_builders import speech, targets, tiny_translator

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
V = 29


def arguments(folder, **fields):
    fields = {"learning_rate": 0.01, "per_device_train_batch_size": 16, "max_steps": 60} | fields
    return TrainingArguments(
        output_dir=str(folder), report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=0,
        use_cpu=True, **fields,
    )  # fmt: skip


def loss_of(model, batch, folder, **fields):
    """What the Trainer computes for one batch."""
    return Trainer(model=model, args=arguments(folder, **fields)).compute_loss(model, dict(batch))


def smoothed(logits, labels, smoothing):
    """(1 - s) times the cross-entropy plus s times the mean over the vocabulary, over what is not -100."""
    losses = F.log_softmax(logits, -1)
    there = labels != -100
    nll = -losses.gather(-1, labels.masked_fill(~there, 0)[..., None])[..., 0]
    return ((1 - smoothing) * nll - smoothing * losses.mean(-1))[there].mean()


@pytest.mark.parametrize(
    "fields", [{}, {"variant": "gated"}, {"adaptive_cutoffs": [10, 20], "adaptive_factor": 2}], ids=str
)
def test_label_smoothing_shifts_the_labels_of_a_language_model(fields, tmp_path):
    model, ids = tiny_model(**fields), tokens(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    expected = smoothed(model(ids).logits[:, :-1], labels[:, 1:], 0.1)
    found = loss_of(model, {"input_ids": ids, "labels": labels}, tmp_path, label_smoothing_factor=0.1)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_label_smoothing_shifts_the_labels_around_adapters(method, tmp_path):
    model, ids = get_peft_model(tiny_model(dtype=torch.float32), METHODS[method]("CAUSAL_LM")), tokens(2, 9)
    expected = smoothed(model(ids).logits[:, :-1], ids[:, 1:], 0.1)
    found = loss_of(model, {"input_ids": ids, "labels": ids}, tmp_path, label_smoothing_factor=0.1)
    torch.testing.assert_close(found, expected)


def test_label_smoothing_learns_the_next_token_and_not_to_copy(tmp_path):
    model = tiny_model(dtype=torch.float32, initializer_range=0.05)
    counting = [{"input_ids": (torch.arange(12) + n) % V, "labels": (torch.arange(12) + n) % V} for n in range(V)]
    Trainer(model=model, args=arguments(tmp_path, label_smoothing_factor=0.1), train_dataset=counting).train()
    ids = torch.stack([row["input_ids"] for row in counting])
    predicted = model.eval()(ids).logits[:, :-1].argmax(-1)
    assert (predicted == ids[:, 1:]).double().mean() > 0.9


def test_label_smoothing_of_the_other_models(tmp_path):
    torch.manual_seed(0)
    ids = tokens(2, 7)
    masked = LeapformerForMaskedLM(tiny_config()).eval()
    labels = torch.full_like(ids, -100)
    labels[:, 2:4] = ids[:, 2:4]
    found = loss_of(masked, {"input_ids": ids, "labels": labels}, tmp_path, label_smoothing_factor=0.2)
    torch.testing.assert_close(found, smoothed(masked(ids).logits, labels, 0.2))
    classifier, classes = LeapformerForSequenceClassification(tiny_config(num_labels=3)).eval(), torch.tensor([0, 2])
    found = loss_of(classifier, {"input_ids": ids, "labels": classes}, tmp_path, label_smoothing_factor=0.2)
    torch.testing.assert_close(found, smoothed(classifier(ids).logits, classes, 0.2))
    translator, features, labels = (
        tiny_translator(dtype=torch.float32),
        speech(2, 20, dtype=torch.float32),
        targets(2, 5),
    )
    batch = {"input_features": features, "labels": labels, "decoder_input_ids": translator.shift_right(labels)}
    found = loss_of(translator, batch, tmp_path, label_smoothing_factor=0.2)
    torch.testing.assert_close(found, smoothed(translator(features, labels=labels).logits, labels, 0.2))
    with pytest.raises(ValueError, match="expected labels or decoder_input_ids, found neither"):
        loss_of(translator, {"input_features": features, "labels": labels}, tmp_path, label_smoothing_factor=0.2)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_accumulated_batches_give_the_loss_of_the_whole(smoothing, tmp_path):
    """num_items_in_batch counts the labels that are predicted, those after the first."""
    data = [{"input_ids": tokens(n, seed=n), "labels": tokens(n, seed=n)} for n in (3, 9, 5, 4)]
    model = tiny_model(dtype=torch.float32)
    fields = {"label_smoothing_factor": smoothing, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 1}
    trainer = Trainer(
        model=model, args=arguments(tmp_path, max_steps=1, learning_rate=0.0, **fields), train_dataset=data
    )
    steps = []
    trainer.training_step = lambda *args, **kwargs: (
        steps.append(Trainer.training_step(trainer, *args, **kwargs)) or steps[-1]
    )
    trainer.train()
    model.eval()
    logits = torch.cat([model(row["input_ids"][None]).logits[0, :-1] for row in data])
    expected = smoothed(logits, torch.cat([row["labels"][1:] for row in data]), smoothing)
    torch.testing.assert_close(sum(steps), expected.detach(), atol=1e-4, rtol=1e-4)


def test_a_flattened_batch_is_packed(tmp_path):
    rows = [tokens(n, seed=n) for n in (5, 8, 2)]
    model = tiny_model()
    features = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in rows]
    whole = sum(model(row[None], labels=row[None]).loss * (len(row) - 1) for row in rows) / sum(
        len(r) - 1 for r in rows
    )
    for extra in ({}, {"return_flash_attn_kwargs": True}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}):
        batch = DataCollatorWithFlattening(return_tensors="pt", **extra)(features)
        torch.testing.assert_close(model(**batch).loss, whole)


def test_a_collator_makes_the_decoders_input():
    model = tiny_translator(source="text", source_vocab_size=20)
    tokenizer = tiny_tokenizer(padding_side="right")
    rows = [{"input_ids": [3, 4, 5], "labels": [6, 7]}, {"input_ids": [3, 4], "labels": [8, 9, 10]}]
    batch = DataCollatorForSeq2Seq(tokenizer, model=model)(rows)
    assert batch["decoder_input_ids"].tolist() == [[1, 6, 7], [1, 8, 9]]
    assert model(**batch).loss.isfinite()
    left = DataCollatorForSeq2Seq(tiny_tokenizer(), model=model)(rows)
    with pytest.raises(ValueError, match="attention_mask: expected padding on the right only"):
        model(**left)
    with pytest.raises(ValueError, match="labels: expected padding on the right only, found it elsewhere"):
        model(input_ids=batch["input_ids"], labels=left["labels"])


LABELS = {
    "one number": ({"num_labels": 1}, torch.tensor([0.5, -1.0])),
    "one number in a column": ({"num_labels": 1}, torch.tensor([[0.5], [-1.0]])),
    "two numbers": ({"num_labels": 2, "problem_type": "regression"}, torch.tensor([[0.5, 1.0], [-1.0, 2.0]])),
    "several labels": ({"num_labels": 3}, torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])),
    "several labels, named": ({"num_labels": 3, "problem_type": "multi_label_classification"}, torch.eye(3)[:2].long()),
    "one of three": ({"num_labels": 3}, torch.tensor([0, 2])),
}


@pytest.mark.parametrize(("fields", "labels"), LABELS.values(), ids=LABELS.keys())
def test_the_loss_follows_problem_type(fields, labels, tmp_path):
    torch.manual_seed(0)
    model, ids = LeapformerForSequenceClassification(tiny_config(**fields)).eval(), tokens(2, 6)
    output = model(ids, labels=labels)
    logits = output.logits
    if "one number" in next(name for name, value in LABELS.items() if value[1] is labels):
        expected = F.mse_loss(logits[:, 0], labels.view(-1))
    elif fields.get("problem_type") == "regression":
        expected = F.mse_loss(logits, labels)
    elif labels.ndim == 2:
        expected = F.binary_cross_entropy_with_logits(logits, labels.float())
    else:
        expected = F.cross_entropy(logits, labels)
    torch.testing.assert_close(output.loss, expected)
    counted = model(ids, labels=labels, num_items_in_batch=2 * labels.numel()).loss
    torch.testing.assert_close(counted, expected / 2)
    rows = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
    trainer = Trainer(model=model, args=arguments(tmp_path, max_steps=2), train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


def test_labels_of_another_shape_are_refused():
    model = LeapformerForSequenceClassification(tiny_config(num_labels=3))
    with pytest.raises(ValueError, match=r"labels: expected \[2, 3\] for problem_type='multi_label_classification'"):
        model(tokens(2, 4), labels=torch.zeros(2, 2))


def test_a_translation_is_evaluated_with_and_without_labels_for_ctc(tmp_path):
    model = tiny_translator(dtype=torch.float32, ctc_weight=0.3)
    rows = [{"input_features": speech(20, dtype=torch.float32), "labels": targets(4)} for _ in range(2)]
    trainer = Trainer(model=model, args=arguments(tmp_path, label_names=["labels"]), eval_dataset=rows)
    assert trainer.evaluate()["eval_loss"] > 0


def tiny_tokenizer(padding_side="left"):
    words = {word: n for n, word in enumerate(["[PAD]", "[MASK]", "</s>", "abcdef", *(f"w{n}" for n in range(4, V))])}
    core = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", mask_token="[MASK]", eos_token="</s>", padding_side=padding_side
    )


def test_pipelines_know_the_models(caplog):
    tokenizer, errors = tiny_tokenizer(), caplog
    with errors.at_level(logging.ERROR):
        model = tiny_model(dtype=torch.float32, pad_token_id=0, eos_token_id=2)
        writer = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        one, two = writer(["w5 w6 w7", "w8"], max_new_tokens=3, do_sample=False, batch_size=2)
        assert one[0]["generated_text"].startswith("w5 w6 w7") and two[0]["generated_text"].startswith("w8")
        classifier = LeapformerForSequenceClassification(tiny_config(num_labels=3, pad_token_id=0)).eval()
        found = pipeline("text-classification", model=classifier, tokenizer=tokenizer, device="cpu")("w5 w6")
        assert found[0]["label"] in ("LABEL_0", "LABEL_1", "LABEL_2")
        labels = {"entailment": 0, "neutral": 1, "contradiction": 2}
        config = tiny_config(label2id=labels, id2label={n: name for name, n in labels.items()}, pad_token_id=0)
        guesser = pipeline(
            "zero-shot-classification", model=LeapformerForSequenceClassification(config).eval(), tokenizer=tokenizer,
            device="cpu",
        )  # fmt: skip
        assert len(guesser("w5 w6", candidate_labels=["w7", "w8"])["labels"]) == 2
        masked = LeapformerForMaskedLM(tiny_config(pad_token_id=0)).eval()
        assert pipeline("fill-mask", model=masked, tokenizer=tokenizer, device="cpu")("w5 [MASK] w7")[0]["token"] < V
    assert [record.message for record in errors.records if record.levelno >= logging.ERROR] == []


def test_stop_strings_need_only_the_tokenizer():
    model, tokenizer = tiny_model(dtype=torch.float32, pad_token_id=0), tiny_tokenizer()
    ids = tokens(1, 4)
    plain = model.generate(ids, max_new_tokens=6, do_sample=False)
    stop = tokenizer.decode(plain[0, 6:7])
    stopped = model.generate(ids, max_new_tokens=6, do_sample=False, stop_strings=[stop], tokenizer=tokenizer)
    assert plain[0, : stopped.shape[1]].tolist() == stopped[0].tolist() and stopped.shape[1] <= 7
