"""Text corpora: where the documents of the three splits come from.

`load_corpus` is the public door. Every fault of the data is one line (LeapformerError) that names the file and, where
there is one, the row or the byte. Word counts follow one rule for all corpora, WikiText's: words are what whitespace
separates, and each line ends with one `<eos>`.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import inspect
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leapformer.errors import LeapformerError, MissingExtra
from leapformer.files.expanding import COMPRESSIONS, largest_file
from leapformer.files.showing import cut, shown
from leapformer.tasks.files import bare_name, inner_suffix, list_files, read_json_rows, read_text, row_text

SPLITS = ("train", "validation", "test")
TEXT_SUFFIXES = (".txt", ".tokens")
ROW_SUFFIXES = (".jsonl",)

_SPLIT_NAMES = {"train": "train", "valid": "validation", "validation": "validation", "val": "validation"}
_SPLIT_NAMES |= {"dev": "validation", "test": "test"}
_SKIPPED_MODULES = {"test", "tests", "idlelib", "turtledemo", "lib2to3", "pydoc_data", "ensurepip", "__pycache__"}
_SKIPPED_MODULES |= {"site-packages", "dist-packages", "encodings", "__hello__", "__phello__"}
_ARTICLE_TITLE = re.compile(r"^ = [^=\n]*(?: = = [^=\n]+)*= $")


@dataclass(frozen=True)
class Corpus:
    """Documents of the three splits; a split may be empty.

    Arguments:
        name: what it is called in reports, such as "wikitext (wikitext2)".
        train, validation, test: lists of documents, each the exact text as it was read.
        separate_documents: True when a tokenizer's end-of-text token belongs after each document. WikiText's articles
            follow one another without one, as in the published evaluations.
    """

    name: str
    train: list[str]
    validation: list[str]
    test: list[str] = field(default_factory=list)
    separate_documents: bool = True

    def split(self, name: str) -> list[str]:
        """The documents of "train", "validation" or "test"; raises LeapformerError when there are none."""
        if name not in SPLITS:
            raise LeapformerError(f"data: unknown split {name!r}: expected one of {', '.join(SPLITS)}")
        documents: list[str] = getattr(self, name)
        if not documents:
            raise LeapformerError(f"data: {self.name} has no {name} split")
        return documents


def count_words(documents: Iterable[str]) -> int:
    """Word-level tokens: whitespace-separated words and one `<eos>` per line.

    A line ends at "\\n"; the end of a document closes a line that is still open.
    """
    total = 0
    for document in documents:
        total += len(document.split()) + document.count("\n")
        total += bool(document) and not document.endswith("\n")
    return total


def count_bytes(documents: Iterable[str]) -> int:
    """Bytes of the documents in UTF-8."""
    return sum(len(document.encode("utf-8")) for document in documents)


def word_tokens(documents: Iterable[str], *, eos: str = "<eos>") -> Iterator[str]:
    """The word-level tokens that `count_words` counts, in order."""
    for document in documents:
        lines = document.split("\n")
        if lines[-1] == "":
            lines.pop()
        for line in lines:
            yield from line.split()
            yield eos


def load_corpus(
    source: str,
    *,
    path: str | Path | None = None,
    subset: str | None = None,
    text_field: str = "text",
    validation_share: float = 0.05,
) -> Corpus:
    """Reads a corpus.

    Arguments:
        source: "pydocs" (inside the Python interpreter), "wikitext" (a folder with the three splits, train and
            validation at least), "text" (a file or folder of .txt and .jsonl, also .gz, .xz, .zst) or "hf" (a data set
            of the Hugging Face hub).
        path: the file or folder; for "hf" the name of the data set. Not for "pydocs".
        subset: configuration of a Hugging Face data set, such as "wikitext-2-raw-v1".
        text_field: the key of a .jsonl row, or the column of a Hugging Face data set, that holds the text.
        validation_share: share of the text held out where the source has no validation split of its own.

    Raises LeapformerError for anything missing, empty or unreadable.
    """
    if source not in _SOURCES:
        near = difflib.get_close_matches(source, _SOURCES, n=1)
        hint = f" (nearest: {near[0]})" if near else ""
        raise LeapformerError(f"data.source: expected one of {', '.join(_SOURCES)}, found {source!r}{hint}")
    if not 0.0 < validation_share < 1.0:
        raise LeapformerError(f"data.validation_share: expected a number between 0 and 1, found {validation_share}")
    if source != "pydocs" and not path:
        wanted = "the name of a data set" if source == "hf" else "a file or folder"
        raise LeapformerError(f"data.path: source {source!r} needs {wanted}, found nothing")
    if source == "pydocs" and path:
        raise LeapformerError(f"data.path: source 'pydocs' reads none, found {str(path)!r}")
    corpus = _SOURCES[source](path, subset, text_field, validation_share)
    for split in ("train", "validation"):
        if not any(document.strip() for document in corpus.split(split)):
            raise LeapformerError(f"data: the {split} split of {corpus.name} has no text")
    return corpus


# ---- files


def _read_rows(path: Path, text_field: str) -> list[str]:
    return [row_text(content, text_field, where) for content, where in read_json_rows(path)]


def _read_documents(path: Path, text_field: str) -> list[str]:
    """A text file is one document, a .jsonl file one per row; documents without text are left out."""
    documents = _read_rows(path, text_field) if inner_suffix(path) in ROW_SUFFIXES else [read_text(path)]
    return [document for document in documents if document.strip()]


# ---- sources


def _corpus(name: str, splits: dict[str, list[str]], *, separate_documents: bool = True) -> Corpus:
    return Corpus(name, splits["train"], splits["validation"], splits["test"], separate_documents)


def _load_text(path: Any, subset: str | None, text_field: str, validation_share: float) -> Corpus:
    root = Path(path)
    readable = TEXT_SUFFIXES + ROW_SUFFIXES
    wanted = f"{', '.join(readable)} (or with {', '.join(COMPRESSIONS)})"
    if not os.path.exists(root):
        raise LeapformerError(f"data.path: expected a file or folder, found nothing at {cut(root, 240)}")
    if root.is_dir():
        files = [file for file in list_files(root, "**/*") if file.is_file() and inner_suffix(file) in readable]
        if not files:
            raise LeapformerError(f"data.path: expected files {wanted} in {root}, found none")
    else:
        files = [root]
        if inner_suffix(root) not in readable:
            raise LeapformerError(f"data.path: expected a file {wanted}, found {root}")
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for file in files:
        splits[_split_of(file) if root.is_dir() else "train"].extend(_read_documents(file, text_field))
    if not any(splits.values()):
        raise LeapformerError(f"data: {root} has no text")
    name = f"text ({root.name})"
    if not splits["train"]:
        raise LeapformerError(f"data: {name} has a {_only_filled(splits)} split and no train split")
    if not splits["validation"]:
        splits["train"], splits["validation"] = hold_out(splits["train"], share=validation_share)
    return _corpus(name, splits)


def _split_of(file: Path) -> str:
    """The split a file's name gives, "train" when it gives none: valid.txt, dev.jsonl.xz, wiki.test.tokens."""
    for part in bare_name(file).lower().replace("-", ".").replace("_", ".").split("."):
        if part in _SPLIT_NAMES:
            return _SPLIT_NAMES[part]
    return "train"


def _only_filled(splits: dict[str, list[str]]) -> str:
    return next(split for split in SPLITS if splits[split])


def hold_out(documents: list[str], *, share: float) -> tuple[list[str], list[str]]:
    """Cuts a list of documents into training and validation.

    From 20 documents on, whole documents are held out, evenly spread whatever their length. With fewer, the last lines
    of every document.
    """
    if len(documents) < 20:
        return _hold_out_tails(documents, share)
    train: list[str] = []
    held: list[str] = []
    for index, document in enumerate(documents, start=1):
        (held if int(index * share) > int((index - 1) * share) else train).append(document)
    if not held:
        held.append(train.pop())
    return train, held


def _hold_out_tails(documents: list[str], share: float) -> tuple[list[str], list[str]]:
    train: list[str] = []
    held: list[str] = []
    for document in documents:
        wanted = max(1, len(document) - max(1, round(share * len(document))))
        cut = document.rfind("\n", 0, wanted) + 1
        if cut == 0:  # one long line: cut at a word, or anywhere
            cut = document.rfind(" ", 0, wanted) + 1 or wanted
        train.append(document[:cut])
        held.append(document[cut:])
    return [text for text in train if text.strip()], [text for text in held if text.strip()]


def _load_wikitext(path: Any, subset: str | None, text_field: str, validation_share: float) -> Corpus:
    root = Path(path)
    if not os.path.isdir(root):
        raise LeapformerError(
            f"data.path: expected a folder with the WikiText layout, found nothing at {cut(root, 240)}"
        )
    texts = {split: _find_wikitext_file(root, split) for split in SPLITS}
    for split in ("train", "validation"):
        if texts[split] is None:
            short = "valid" if split == "validation" else split
            found = cut(", ".join(sorted(file.name for file in root.iterdir())[:8])) or "nothing"
            raise LeapformerError(
                f"data.path: expected wiki.{short}.tokens or {short}.txt (or with .gz, .xz, .zst) in {root}, found "
                f"{found}"
            )
    articles = {split: split_articles(read_text(file)) if file else [] for split, file in texts.items()}
    return _corpus(f"wikitext ({root.name})", articles, separate_documents=False)


def _find_wikitext_file(root: Path, split: str) -> Path | None:
    for short in ("valid", "validation") if split == "validation" else (split,):
        for stem in (f"wiki.{short}.tokens", f"wiki.{short}.raw", f"{short}.txt"):
            for suffix in ("", *COMPRESSIONS):
                if (root / (stem + suffix)).is_file():
                    return root / (stem + suffix)
    return None


def split_articles(text: str) -> list[str]:
    """Cuts WikiText at its titles, ` = Title = ` between two blank lines; joined again, the articles are the text."""
    lines = text.split("\n")
    starts = [
        index - 1
        for index in range(1, len(lines) - 1)
        if _ARTICLE_TITLE.match(lines[index]) and not lines[index - 1].strip() and not lines[index + 1].strip()
    ]
    edges = sorted({0, *starts})
    pieces = ["\n".join(lines[a:b]) + "\n" for a, b in zip(edges, edges[1:], strict=False)]
    return [*pieces, "\n".join(lines[edges[-1] :])]


def _load_pydocs(path: Any, subset: str | None, text_field: str, validation_share: float) -> Corpus:
    topics = {**_help_topics(), **_library_docstrings()}
    if not topics:
        raise LeapformerError("data: source 'pydocs': this Python has neither pydoc_data.topics nor library sources")
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for topic, text in topics.items():
        splits[_pydocs_split(topic)].append(text)
    held = {paragraph for split in ("validation", "test") for text in splits[split] for paragraph in _long(text)}
    splits["train"] = [text for text in (_without(text, held) for text in splits["train"]) if text.strip()]
    return _corpus("pydocs", splits)


def _pydocs_split(topic: str) -> str:
    """5 % of the topics for validation and 5 % for the test, by a hash of the topic's name."""
    share = int.from_bytes(hashlib.sha256(topic.encode()).digest()[:4], "big") % 20
    return {0: "validation", 1: "test"}.get(share, "train")


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n[ \t]*\n", text)


def _long(text: str) -> list[str]:
    """Paragraphs long enough that a repetition is no chance, with white space made even."""
    even = (" ".join(paragraph.split()) for paragraph in _paragraphs(text))
    return [paragraph for paragraph in even if len(paragraph) >= 40]


def _without(text: str, held: set[str]) -> str:
    """Python's help repeats whole sections under several topics; what is held out must not be learned by heart."""
    return "\n\n".join(piece for piece in _paragraphs(text) if " ".join(piece.split()) not in held)


def _help_topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return {f"topic {name}": text.strip("\n") + "\n" for name, text in sorted(topics.items())}


def _library_docstrings() -> dict[str, str]:
    """One document for each top-level module or package of the standard library; nothing is imported, only parsed."""
    root = Path(sysconfig.get_path("stdlib"))
    documents: dict[str, list[str]] = {}
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if _SKIPPED_MODULES.isdisjoint(parts):
            documents.setdefault(parts[0], []).extend(_docstrings(file))
    return {f"module {name}": "\n\n".join(texts) + "\n" for name, texts in documents.items() if texts}


def _docstrings(file: Path) -> list[str]:
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):  # templates of code generators are not Python
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(tree) if isinstance(node, kinds))
    found = (ast.get_docstring(node, clean=False) for node in nodes)
    return [inspect.cleandoc(text) for text in found if text and text.strip()]


def _load_hf(path: Any, subset: str | None, text_field: str, validation_share: float) -> Corpus:
    try:
        import datasets
    except ImportError:
        raise MissingExtra("lm", package="datasets", purpose="a data set of the Hugging Face hub") from None
    name = f"{path}/{subset}" if subset else str(path)
    try:
        # Since version 4 datasets runs no code of a data set, and has no argument to forbid it.
        loaded: Any = datasets.load_dataset(str(path), subset)
    except Exception as error:  # the hub's errors share no base class; the first line says what was wrong
        reason = cut((str(error).strip() or type(error).__name__).splitlines()[0], 200)
        raise LeapformerError(f"data.path: cannot load the Hugging Face data set {shown(name)}: {reason}") from None
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        if split not in loaded:
            continue
        if text_field not in loaded[split].column_names:
            columns = cut(", ".join(loaded[split].column_names))
            raise LeapformerError(f"data.text_field: {name!r} has the columns {columns}, found no {text_field!r}")
        splits[split] = _hf_texts(loaded[split], text_field, f"{name} ({split})")
    if not splits["train"]:
        raise LeapformerError(f"data.path: {name!r} has no train split with text")
    if not splits["validation"]:
        splits["train"], splits["validation"] = hold_out(splits["train"], share=validation_share)
    return _corpus(f"hf ({name})", splits)


def _hf_texts(rows: Any, text_field: str, where: str) -> list[str]:
    """The texts of a column; a small file on disk can become any number of rows, so they are measured first."""
    size, most = rows.select_columns(text_field).data.nbytes, largest_file()
    if size > most:
        raise LeapformerError(
            f"data.path: {where}: expected at most {most:,} bytes, as the memory allows, found {size:,}"
        )
    texts = rows[text_field]
    for row, text in enumerate(texts):
        if text is not None and not isinstance(text, str):
            raise LeapformerError(
                f"data.text_field: {where}: expected text under {text_field!r}, found {shown(text)} in row {row}"
            )
    return [text for text in texts if text and text.strip()]


_SOURCES: dict[str, Callable[[Any, str | None, str, float], Corpus]] = {
    "pydocs": _load_pydocs,
    "text": _load_text,
    "wikitext": _load_wikitext,
    "hf": _load_hf,
}
SOURCES = tuple(_SOURCES)
