"""ListOps: nested MIN, MAX, MED and SM (sum modulo 10) of digits; what is the value of the expression?

Definition (Nangia and Bowman 2018; Tay et al. 2021, arXiv 2011.04006): from depth 1, below depth 10, a node is an
operator with probability 1/4, one of four, with 2 to 10 arguments, all uniform; otherwise it is a uniform digit. An
expression is kept where 500 < length < 2000; a digit, an operator and a closing bracket are one token each. MED of an
even number of arguments is the mean of the two in the middle, cut to an integer.

R: roots drawn at once. Trees are grown, measured and evaluated level by level for all roots together.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from leapformer.errors import LeapformerError
from leapformer.files.showing import shown
from leapformer.tasks.files import iterate_lines
from leapformer.tasks.lra.harness import convert_pickles, has_pickles
from leapformer.tasks.lra.preparation import Description, Job, make_shards
from leapformer.tasks.lra.storage import SplitWriter, read_arrays
from leapformer.tasks.preparation import parts_key

GENERATOR = "listops generator 1"
CONVERTER = "listops reader 1"
OPTIONS = {"min_length": 501, "max_length": 1999}  # both ends are kept

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
SYMBOLS = ("<pad>", *"0123456789", *OPERATORS, "]")  # the id of a symbol is its place
FIRST_DIGIT, FIRST_OPERATOR, CLOSE = 1, 11, 15
MIN, MAX, MED, SM = range(4)

OPERATOR_SHARE = 0.25
ARGUMENTS = (2, 10)
MAX_DEPTH = 10
COUNTS = {"train": 96_000, "validation": 2_000, "test": 2_000}

SHARD = 2_000
_ROOTS = 8_000
_EMPTY_BATCHES = 100  # without one expression of the right length, there are none
# Below this many new expressions from a shard, so few are left to find that drawing on would not end.
_LEAST_NEW = SHARD // 100

RELEASE_FILES = {"train": "basic_train.tsv", "validation": "basic_val.tsv", "test": "basic_test.tsv"}


def prepare(job: Job) -> Description:
    """Generate the expressions, or convert the release's files."""
    if job.source is not None:
        return _convert(job)
    shortest, longest = job.options["min_length"], job.options["max_length"]
    if not 1 <= shortest <= longest <= 100_000:
        raise LeapformerError(
            f"--min-length, --max-length: expected 1 <= shortest <= longest <= 100,000, found {shortest} and {longest}"
        )
    return _generate(job)


# ---- generator


@dataclass
class Level:
    """The nodes of all trees at one depth, the children of a node next to each other.

    parent: index into the level above. operator: 0 to 3, or -1 for a digit. value: of digits; operators' are filled in
    by `_evaluate`. first, count: the children of an operator in the level below. tree: which root.
    """

    tree: np.ndarray
    parent: np.ndarray
    operator: np.ndarray
    value: np.ndarray
    first: np.ndarray
    count: np.ndarray


def generate(generator: np.random.Generator, *, roots: int, min_length: int, max_length: int) -> tuple:
    """Draw trees and keep those of the right length.

    Returns:
        tokens uint8 [n], lengths int64 [N], labels uint8 [N]; N is what was kept of the roots.
    """
    levels = _grow(generator, roots, max_length)
    sizes = _sizes(levels)
    lengths = sizes[0]
    kept = (lengths >= min_length) & (lengths <= max_length) & (levels[0].tree >= 0)
    _evaluate(levels)
    starts = np.concatenate([[0], np.cumsum(np.where(kept, lengths, 0))])
    tokens = np.zeros(starts[-1], dtype=np.uint8)
    _write(levels, sizes, kept, starts[:-1], tokens)
    return tokens, lengths[kept], levels[0].value[kept].astype(np.uint8)


def _grow(generator: np.random.Generator, roots: int, max_length: int) -> list[Level]:
    """Level by level; a tree that is too long already grows no further, and its root's `tree` becomes -1."""
    levels: list[Level] = []
    tree, parent = np.arange(roots), np.zeros(roots, dtype=np.int64)
    length = np.zeros(roots, dtype=np.int64)
    alive = np.ones(roots, dtype=bool)
    for depth in range(1, MAX_DEPTH + 1):
        n = len(tree)
        is_operator = (generator.random(n) <= OPERATOR_SHARE) & (depth < MAX_DEPTH)
        value = generator.integers(0, 10, n)
        operator = np.where(is_operator, generator.integers(0, 4, n), -1)
        count = np.where(is_operator, generator.integers(ARGUMENTS[0], ARGUMENTS[1] + 1, n), 0)
        length += np.bincount(tree, weights=1 + is_operator, minlength=roots).astype(np.int64)
        alive &= length <= max_length
        count[~alive[tree]] = 0
        first = np.cumsum(count) - count
        levels.append(Level(tree, parent, operator, value, first, count))
        parent = np.repeat(np.arange(n), count)
        tree = tree[parent]
        if not len(tree):
            break
    levels[0].tree = np.where(alive, levels[0].tree, -1)
    return levels


def _sizes(levels: list[Level]) -> list[np.ndarray]:
    """Tokens of the expression below each node, level by level."""
    sizes = [1 + (level.operator >= 0) for level in levels]
    for above, size, level in zip(sizes[-2::-1], sizes[:0:-1], levels[:0:-1], strict=True):
        above += np.bincount(level.parent, weights=size, minlength=len(above)).astype(np.int64)
    return sizes


def _evaluate(levels: list[Level]) -> None:
    """Fill in the values of the operators, from the leaves up."""
    for level, below in zip(levels[-2::-1], levels[:0:-1], strict=True):
        nodes = np.flatnonzero(level.count)
        if not len(nodes):
            continue
        first, count, operator = level.first[nodes], level.count[nodes], level.operator[nodes]
        # Children are already in the order of their parents, so this sorts each one's arguments in place.
        ordered = np.sort(below.parent * 10 + below.value) % 10
        smallest, largest = ordered[first], ordered[first + count - 1]
        middle = (ordered[first + (count - 1) // 2] + ordered[first + count // 2]) // 2
        total = np.add.reduceat(below.value, first) % 10
        level.value[nodes] = np.choose(operator, [smallest, largest, middle, total])


def _write(
    levels: list[Level], sizes: list[np.ndarray], kept: np.ndarray, start: np.ndarray, tokens: np.ndarray
) -> None:
    """Put the symbols of the kept trees where they belong, from the roots down."""
    chosen = kept
    for depth, level in enumerate(levels):
        is_operator = level.operator >= 0
        symbol = np.where(is_operator, FIRST_OPERATOR + level.operator, FIRST_DIGIT + level.value)
        tokens[start[chosen]] = symbol[chosen]
        closed = chosen & is_operator
        tokens[(start + sizes[depth] - 1)[closed]] = CLOSE
        if depth + 1 < len(levels):
            below, size = levels[depth + 1], sizes[depth + 1]
            before = np.cumsum(size) - size  # tokens of all nodes to the left on the level
            start = start[below.parent] + 1 + before - before[level.first[below.parent]]
            chosen = chosen[below.parent]


def make_shard(path: Path, seed: int, number: int, shortest: int, longest: int) -> None:
    """Write the shard of this number: SHARD expressions, without regard to duplicates."""
    generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0, number)))
    with SplitWriter(path) as writer:
        batches = 0
        while len(writer.labels) < SHARD:
            tokens, lengths, labels = generate(generator, roots=_ROOTS, min_length=shortest, max_length=longest)
            wanted = SHARD - len(writer.labels)
            writer.add_many(tokens[: lengths[:wanted].sum()], lengths[:wanted], labels[:wanted])
            batches += 1
            if batches == _EMPTY_BATCHES and not writer.labels:
                raise LeapformerError(f"listops: expected expressions of {shortest} to {longest} tokens, found none")


def _generate(job: Job) -> Description:
    """Shards in parallel, joined in their order without duplicates, so that the workers' number changes nothing."""
    shortest, longest = job.options["min_length"], job.options["max_length"]
    counts = dict(COUNTS)
    if job.count is not None:
        rest = max(1, min(COUNTS["test"], job.count // 10))
        counts = {"train": job.count, "validation": rest, "test": rest}
    key = parts_key(GENERATOR, job.seed, shortest, longest)
    wanted = -(-sum(counts.values()) // SHARD)
    seen: set[bytes] = set()
    examples = _without_duplicates(job, key, wanted, seen)
    for split, count in counts.items():
        with job.writer(split) as writer:
            for _ in range(count):
                writer.add(*next(examples))
    return _description(longest)


def _without_duplicates(job: Job, key: str, wanted: int, seen: set[bytes]) -> Iterator[tuple[bytes, int]]:
    shortest, longest = job.options["min_length"], job.options["max_length"]
    number = 0
    while True:
        numbers = range(number, max(wanted, number + 1))
        paths = [job.output / ".parts" / f"listops-{key}-{shard:05d}.safetensors" for shard in numbers]
        make_shards(make_shard, paths, [(job.seed, shard, shortest, longest) for shard in numbers], job)
        for path in paths:
            before = len(seen)
            arrays = read_arrays(path)
            offsets, tokens = arrays["offsets"], arrays["tokens"].tobytes()
            for begin, end, label in zip(offsets[:-1], offsets[1:], arrays["labels"].tolist(), strict=True):
                expression = tokens[begin:end]
                if expression not in seen:
                    seen.add(expression)
                    yield expression, label
            if len(seen) - before < _LEAST_NEW:
                raise LeapformerError(
                    f"listops: expected more different expressions of {shortest} to {longest} tokens, "
                    f"found {len(seen):,}; ask for fewer with --count"
                )
        number = numbers.stop


def _description(longest: int) -> Description:
    return Description(vocab_size=len(SYMBOLS), num_classes=10, max_length=longest, maker=GENERATOR, symbols=SYMBOLS)


# ---- the release's files

_AS_LETTERS = tuple(
    (symbol.encode(), letter) for symbol, letter in zip(OPERATORS, (b"a", b"b", b"c", b"d"), strict=True)
)
_IDS = bytes.maketrans(b"0123456789abcd]", bytes(range(FIRST_DIGIT, CLOSE + 1)))


def parse(source: bytes) -> bytes:
    """Ids of an expression in the release's form, such as b"( ( ( [MIN 3 ) 4 ) ] )".

    Raises:
        ValueError: says what is wrong with it.
    """
    text = source.replace(b"(", b" ").replace(b")", b" ")
    parts = text.split()
    for symbol, letter in _AS_LETTERS:
        text = text.replace(symbol, letter)
    compact = b"".join(text.split())
    if len(compact) != len(parts) or compact.translate(None, b"0123456789abcd]"):
        known = {symbol.encode() for symbol in SYMBOLS[1:]}
        unknown = next((part for part in parts if part not in known), parts[0] if parts else b"nothing")
        raise ValueError(
            f"expected digits, {', '.join(OPERATORS)} and ], found {unknown.decode(errors='replace')[:20]!r}"
        )
    if not compact:
        raise ValueError("expected an expression, found nothing")
    opened, closed = sum(compact.count(letter) for _, letter in _AS_LETTERS), compact.count(b"]")
    if opened != closed or source.count(b"(") != source.count(b")"):
        raise ValueError(f"expected as many closing as opening brackets, found {opened} operators and {closed} ]")
    return compact.translate(_IDS)


def read_release(path: Path, job: Job) -> Iterator[tuple[bytes, int]]:
    """Ids and label of each row of a file of the release; bad rows go to `job.bad`."""
    if not os.path.lexists(path):
        raise LeapformerError(f"{path}: expected a file of the release, found none")
    lines = iterate_lines(path)
    size, position = path.stat().st_size, 0
    header = next(lines, b"").rstrip(b"\r\n").split(b"\t")
    if header != [b"Source", b"Target"]:
        raise LeapformerError(f"{path}:1: expected the header Source<tab>Target, found {shown(header)}")
    for row, line in enumerate(lines, start=2):
        try:
            yield _parse_row(line.rstrip(b"\r\n"))
        except ValueError as error:
            job.bad.report(f"{path}:{row}: {error}")
        position += len(line)
        if row % 1000 == 0:
            job.progress(position, size, path.name)


def _parse_row(line: bytes) -> tuple[bytes, int]:
    columns = line.split(b"\t")
    if len(columns) != 2:
        raise ValueError(f"expected 2 columns, Source and Target, found {len(columns)}")
    if len(columns[1]) != 1 or not columns[1].isdigit():
        raise ValueError(f"expected a label 0 to 9, found {columns[1].decode(errors='replace')[:20]!r}")
    return parse(columns[0]), int(columns[1])


def _convert(job: Job) -> Description:
    """The release's folder, or the folder around it, or a folder of an older harness's pickles."""
    assert job.source is not None
    if has_pickles(job.source, "listops"):
        return convert_pickles(job, "listops", Description(256, 10, 1, CONVERTER), own_symbols=True)
    folder = job.source / "listops-1000" if (job.source / "listops-1000").is_dir() else job.source
    longest = 1
    for split, name in RELEASE_FILES.items():
        with job.writer(split) as writer:
            for ids, label in read_release(folder / name, job):
                writer.add(ids, label)
                longest = max(longest, len(ids))
    return _description(longest)
