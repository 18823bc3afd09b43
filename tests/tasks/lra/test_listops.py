"""ListOps: the generator's statistics and labels, the release's files, and what is said of a bad row."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from leapformer.errors import LeapformerError
from leapformer.tasks.lra import listops
from leapformer.tasks.lra.baselines import majority_baseline, root_operator_baseline
from leapformer.tasks.lra.dataset import load
from leapformer.tasks.lra.listops import SYMBOLS, generate, parse
from leapformer.tasks.lra.preparation import prepare
from leapformer.tasks.lra.storage import read_arrays
from tests.tasks.lra.builders import fails, spread

ROOTS = 40_000
MEASURED_ON = 20_000  # examples behind the shares below


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    parts = [generate(np.random.default_rng(seed), roots=8000, min_length=501, max_length=1999) for seed in range(5)]
    tokens, lengths, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return tokens, lengths, labels


def evaluate(symbols: list[str]) -> int:
    """The value of an expression, written apart from the generator: by a stack, from left to right."""
    operations = {
        "[MIN": min,
        "[MAX": max,
        "[MED": lambda arguments: int(statistics.median(arguments)),
        "[SM": lambda arguments: sum(arguments) % 10,
    }
    stack: list[list] = [[]]
    for symbol in symbols:
        if symbol in operations:
            stack.append([symbol])
        elif symbol == "]":
            operator, *arguments = stack.pop()
            stack[-1].append(operations[operator](arguments))
        else:
            stack[-1].append(int(symbol))
    ((value,),) = stack
    return value


def symbols_of(ids) -> list[str]:
    return [SYMBOLS[number] for number in ids]


def test_an_evaluator_of_its_own_finds_every_label(drawn):
    tokens, lengths, labels = drawn
    documents = np.split(tokens, np.cumsum(lengths)[:-1])
    assert [evaluate(symbols_of(document)) for document in documents] == labels.tolist()


def test_acceptance_and_lengths(drawn):
    _, lengths, _ = drawn
    n = len(lengths)
    # 8.2 % and 1,040 were measured on 20,000 examples, so on 244,000 roots; both are rounded.
    assert n / ROOTS == pytest.approx(0.082, abs=0.0005 + spread(0.082, ROOTS, measured_on=MEASURED_ON / 0.082))
    deviation = lengths.std() * (1 / n + 1 / MEASURED_ON) ** 0.5
    assert lengths.mean() == pytest.approx(1040, abs=5 + 4 * deviation)
    assert lengths.min() >= 501 and lengths.max() <= 1999


def test_label_shares(drawn):
    labels = drawn[2]
    shares = np.bincount(labels, minlength=10) / len(labels)
    for label, share in ((0, 0.173), (9, 0.175)):
        assert shares[label] == pytest.approx(share, abs=0.0005 + spread(share, len(labels), measured_on=MEASURED_ON))
    low, high = 0.075, 0.094
    assert shares[1:9].min() > low - spread(low, len(labels), measured_on=MEASURED_ON)
    assert shares[1:9].max() < high + spread(high, len(labels), measured_on=MEASURED_ON)


def test_operators_and_digits_are_uniform(drawn):
    tokens = drawn[0]
    counts = np.bincount(tokens, minlength=len(SYMBOLS))
    assert counts[0] == 0 and counts[11:15].sum() == counts[15]
    # Long trees are kept, but which operator or digit a node has says nothing about its tree's length.
    for group in (counts[1:11], counts[11:15]):
        share = 1 / len(group)
        assert np.abs(group / group.sum() - share).max() < spread(share, group.sum())


def test_arguments_and_depth(drawn):
    tokens, lengths, _ = drawn
    deepest, arguments = 0, set()
    for document in np.split(tokens, np.cumsum(lengths)[:-1])[:200]:
        open_counts = [0]
        for symbol in symbols_of(document):
            if symbol == "]":
                arguments.add(open_counts.pop())
            else:
                open_counts[-1] += 1
                if symbol.startswith("["):
                    open_counts.append(0)
            deepest = max(deepest, len(open_counts))
    assert arguments == set(range(2, 11))
    assert deepest == 10  # operators reach depth 9, their arguments depth 10


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A reduced set, as for short runs."""
    folder = tmp_path_factory.mktemp("listops") / "small"
    prepare("listops", folder, count=5000, min_length=100, max_length=300, workers=1, seed=3)
    return folder


def test_prepared_sets_have_their_sizes_and_no_duplicates(small):
    card = json.loads((small / "card.json").read_text())
    assert [card["splits"][split]["examples"] for split in ("train", "validation", "test")] == [5000, 500, 500]
    assert card["made"]["seed"] == 3 and card["vocab_size"] == 16 and card["symbols"][0] == "<pad>"
    assert sorted(path.name for path in small.iterdir()) == [
        "card.json", "test.safetensors", "train.safetensors", "validation.safetensors",
    ]  # fmt: skip
    documents = []
    for split in ("train", "validation", "test"):
        dataset = load("listops", small, split)
        documents += [bytes(dataset[index]["input_ids"]) for index in range(len(dataset))]
    assert len(set(documents)) == 6000
    assert all(100 <= len(document) <= 300 for document in documents)


def test_the_root_operator_alone(drawn, small, tmp_path):
    tokens, lengths, labels = drawn
    starts = np.cumsum(lengths) - lengths
    best = [np.bincount(labels[tokens[starts] == operator]).max() for operator in range(11, 15)]
    # Best labels chosen on the same examples: the choice of 4 of 10 labels adds little, and is within the tolerance.
    score = sum(best) / len(labels)
    assert score == pytest.approx(0.363, abs=0.0005 + spread(0.363, len(labels), measured_on=MEASURED_ON))
    train, test = load("listops", small, "train"), load("listops", small, "test")
    assert root_operator_baseline(train, test) > majority_baseline(train, test) + 0.1


def test_the_number_of_workers_changes_nothing(small, tmp_path):
    other = tmp_path / "two"
    prepare("listops", other, count=5000, min_length=100, max_length=300, workers=2, seed=3)
    for split in ("train", "validation", "test"):
        assert (small / f"{split}.safetensors").read_bytes() == (other / f"{split}.safetensors").read_bytes()
    assert (small / "card.json").read_text() == (other / "card.json").read_text()


def test_another_seed_is_another_set(small, tmp_path):
    prepare("listops", tmp_path / "x", count=100, min_length=100, max_length=300, workers=1, seed=4)
    first = load("listops", tmp_path / "x", "train")[0]["input_ids"]
    assert bytes(first) != bytes(load("listops", small, "train")[0]["input_ids"])


def test_an_interrupted_preparation_goes_on(small, tmp_path, monkeypatch):
    made = []

    def interrupted(path, *arguments):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(path.name)
        whole(path, *arguments)

    whole = listops.make_shard
    monkeypatch.setattr(listops, "make_shard", interrupted)
    options = {"count": 5000, "min_length": 100, "max_length": 300, "workers": 1, "seed": 3}
    with pytest.raises(KeyboardInterrupt):
        prepare("listops", tmp_path / "x", **options)
    with pytest.raises(LeapformerError, match="expected prepared data, found no card.json"):
        load("listops", tmp_path / "x", "train")
    (tmp_path / "x" / ".parts" / made[1]).write_bytes(b"cut off")
    monkeypatch.setattr(
        listops, "make_shard", lambda path, *arguments: (made.append(path.name), whole(path, *arguments))
    )
    prepare("listops", tmp_path / "x", **options)
    assert len(made) == 4 and made[2] == made[1]  # the whole shard was taken up, the damaged one made again
    assert (tmp_path / "x" / "train.safetensors").read_bytes() == (small / "train.safetensors").read_bytes()


def test_an_interrupt_ends_every_process(small, tmp_path):
    """As Ctrl-C does it, to all processes of the group."""
    # What a shell starts in the background ignores Ctrl-C, and hands that on.
    handler = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = f"{handler}; from leapformer.cli import main; raise SystemExit(main())"
    options = ["--count", "100000", "--min-length", "100", "--max-length", "300", "--workers", "2"]
    command = [sys.executable, "-c", program, "data", "prepare", "lra-listops", *options, "--output", tmp_path / "x"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    while not list((tmp_path / "x").glob(".parts/listops-*")) and process.poll() is None:
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 130 and b"The same command goes on." in output
    _, left = psutil.wait_procs(children, timeout=10)
    assert len(children) >= 2 and [child for child in left if child.status() != psutil.STATUS_ZOMBIE] == []


def test_a_fault_in_a_process_is_told(tmp_path):
    fails("listops: expected expressions of 2 to 3 tokens, found none", "listops",
          tmp_path / "x", min_length=2, max_length=3, workers=2)  # fmt: skip


def test_what_is_there_is_left_as_it_is(small):
    before = (small / "train.safetensors").stat().st_mtime_ns
    prepare("listops", small, count=5000, min_length=100, max_length=300, workers=1, seed=3)
    assert (small / "train.safetensors").stat().st_mtime_ns == before
    with pytest.raises(LeapformerError, match="holds data with seed 3, expected 4; choose another --output"):
        prepare("listops", small, count=5000, min_length=100, max_length=300, workers=1, seed=4)


def test_wrong_options(tmp_path):
    fails("1 <= shortest <= longest", "listops", tmp_path / "x", min_length=9, max_length=3)
    fails("--size is not an option of this task", "listops", tmp_path / "x", size=32)
    fails("expected more different expressions", "listops", tmp_path / "x", min_length=1, max_length=3, workers=1)
    fails("--count: expected none beside --from, or an integer from 1 on, found 0", "listops", tmp_path / "x", count=0)


# ---- the release's files

ROWS = ["( ( ( [MIN 3 ) 4 ) ] )\t3", "( ( ( ( [SM 9 ) 9 ) ( ( ( [MAX 1 ) 2 ) ] ) ) ] )\t0", "7\t7"]
HEADER = "Source\tTarget"


def write_release(folder: Path, rows: list[str], *, end: str = "\n") -> Path:
    folder.mkdir(parents=True)
    for name in ("basic_train.tsv", "basic_val.tsv", "basic_test.tsv"):
        (folder / name).write_text(HEADER + end + end.join(rows) + end, newline="")
    return folder


def test_expressions_of_the_release():
    assert symbols_of(parse(b"( ( ( [MIN 3 ) 4 ) ] )")) == ["[MIN", "3", "4", "]"]
    ids = parse(ROWS[1].split("\t")[0].encode())
    assert symbols_of(ids) == ["[SM", "9", "9", "[MAX", "1", "2", "]", "]"] and evaluate(symbols_of(ids)) == 0


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_release_is_read(tmp_path, end):
    write_release(tmp_path / "release" / "listops-1000", ROWS, end=end)
    card = prepare("listops", tmp_path / "x", source=tmp_path / "release")
    assert card["bad_rows"] == [] and card["made"]["source"] == "release"
    dataset = load("listops", tmp_path / "x", "validation")
    assert symbols_of(dataset[0]["input_ids"]) == ["[MIN", "3", "4", "]"]
    assert dataset.labels.tolist() == [3, 0, 7] and dataset.max_length == 8
    assert dataset[-1]["label"] == 7


BAD_ROWS = [
    ("( ( [MIN 3 ) 4 ) ]", "expected 2 columns, Source and Target, found 1"),
    ("( ( ( [MIN 3 ) 4 ) ] )\t11", "expected a label 0 to 9, found '11'"),
    ("( ( ( [MIN 3 ) 4 ) ] )\tx", "expected a label 0 to 9, found 'x'"),
    ("( ( ( [MIN 3 ) 4 ) )\t3", "1 operators and 0 ]"),
    ("( ( ( [MIN 3 ) 14 ) ] )\t3", "found '14'"),
    ("( ( ( [AVG 3 ) 4 ) ] )\t3", r"found '\[AVG'"),
    ("( )\t3", "found nothing"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_a_bad_row_is_named(tmp_path, row, message):
    source = write_release(tmp_path / "release", [ROWS[0], row, ROWS[2]])
    fails(rf"basic_train\.tsv:3: .*{message}", "listops", tmp_path / "x", source=source)


def test_bad_rows_are_skipped_counted_and_listed(tmp_path):
    source = write_release(tmp_path / "release", [ROWS[0], *(row for row, _ in BAD_ROWS)])
    card = prepare("listops", tmp_path / "x", source=source, skip_bad=True)
    assert len(card["bad_rows"]) == 3 * len(BAD_ROWS)
    assert f"{source / 'basic_train.tsv'}:3: expected 2 columns, Source and Target, found 1" in card["bad_rows"]
    assert card["splits"]["train"]["examples"] == 1


def test_files_of_the_release_that_are_not_there(tmp_path):
    source = write_release(tmp_path / "release", ROWS)
    (source / "basic_val.tsv").unlink()
    fails("basic_val.tsv: expected a file of the release", "listops", tmp_path / "x", source=source)
    (source / "basic_val.tsv").write_text("Input\tOutput\n")
    fails("basic_val.tsv:1: expected the header Source<tab>Target", "listops", tmp_path / "x", source=source)
    fails("found nothing", "listops", tmp_path / "x", source=tmp_path / "none")


def test_brackets_can_be_left_out(small):
    with_brackets, without = (load("listops", small, "test", brackets=brackets) for brackets in (True, False))
    assert (with_brackets.vocab_size, without.vocab_size) == (16, 15)
    for index in (0, 1, 2):
        kept = [symbol for symbol in symbols_of(with_brackets[index]["input_ids"]) if symbol != "]"]
        assert symbols_of(without[index]["input_ids"]) == kept


def test_shards_are_whole_files(small, tmp_path):
    listops.make_shard(tmp_path / "shard.safetensors", 3, 0, 100, 300)
    arrays = read_arrays(tmp_path / "shard.safetensors")
    train = load("listops", small, "train")
    assert len(arrays["labels"]) == listops.SHARD and arrays["labels"][0] == train.labels[0]
