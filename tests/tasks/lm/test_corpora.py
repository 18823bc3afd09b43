"""Where documents come from, and what is said of a bad one."""

import gzip
import json
import lzma
import os
from pathlib import Path

import pytest
import zstandard

from leapformer.errors import LeapformerError
from leapformer.tasks.lm import corpora
from leapformer.tasks.lm.corpora import count_bytes, count_words, hold_out, load_corpus, split_articles, word_tokens

COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}
ARTICLES = " \n = One = \n \n Words , and more . \n = = Section = = \n \n Text = x = \n \n = Two ( b ) = \n \n End . \n"


@pytest.fixture(scope="module")
def pydocs():
    return load_corpus("pydocs")


@pytest.fixture
def wikitext_folder() -> Path:
    folder = Path(os.environ.get("LEAPFORMER_DATA", "")) / "wikitext2"
    if not os.environ.get("LEAPFORMER_DATA") or not folder.is_dir():
        pytest.skip("LEAPFORMER_DATA names no folder that holds wikitext2")
    return folder


def fails(match: str, *arguments, **keywords) -> None:
    with pytest.raises(LeapformerError, match=match) as caught:
        load_corpus(*arguments, **keywords)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("document", "expected"),
    [("a b\nc\n", ["a", "b", "<eos>", "c", "<eos>"]), ("a", ["a", "<eos>"]), (" \n", ["<eos>"]), ("", [])],
)
def test_words_are_what_whitespace_separates_and_one_eos_per_line(document, expected):
    assert list(word_tokens([document])) == expected
    assert count_words([document]) == len(expected)


def test_bytes_are_utf8():
    assert count_bytes(["aé", "😀"]) == 7


def test_wikitext2_has_the_published_counts(wikitext_folder):
    corpus = load_corpus("wikitext", path=wikitext_folder)
    assert (count_words(corpus.train), count_words(corpus.validation)) == (2_088_628, 217_646)
    assert len(set(word_tokens(corpus.train))) == 33_278
    assert (len(corpus.train), len(corpus.validation)) == (600, 60)
    assert not corpus.separate_documents


@pytest.mark.parametrize("names", [("wiki.train.tokens", "wiki.valid.tokens"), ("train.txt", "valid.txt")])
@pytest.mark.parametrize("suffix", COMPRESS)
def test_wikitext_layouts(tmp_path, names, suffix):
    for name in names:
        (tmp_path / (name + suffix)).write_bytes(COMPRESS[suffix](ARTICLES.encode()))
    corpus = load_corpus("wikitext", path=tmp_path)
    assert "".join(corpus.train) == "".join(corpus.validation) == ARTICLES
    assert corpus.test == []
    with pytest.raises(LeapformerError, match="has no test split"):
        corpus.split("test")
    with pytest.raises(LeapformerError, match="unknown split 'dev'"):
        corpus.split("dev")


def test_articles_are_cut_at_titles_only():
    articles = split_articles(ARTICLES)
    assert "".join(articles) == ARTICLES
    assert [article[:9] for article in articles] == [" \n = One ", " \n = Two "]
    assert split_articles("no title") == ["no title"]


def test_pydocs_has_three_splits_of_real_text_that_share_no_paragraph(pydocs):
    sizes = {split: count_bytes(pydocs.split(split)) for split in corpora.SPLITS}
    assert sizes["train"] > 500_000
    assert sizes["validation"] > 20_000
    assert sizes["test"] > 20_000
    learned = {paragraph for text in pydocs.train for paragraph in corpora._long(text)}
    assert learned.isdisjoint(
        paragraph for text in pydocs.validation + pydocs.test for paragraph in corpora._long(text)
    )


def test_pydocs_is_the_same_every_time(pydocs):
    assert load_corpus("pydocs") == pydocs


def test_pydocs_needs_neither_sources_nor_imports(monkeypatch, tmp_path):
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(tmp_path))
    assert load_corpus("pydocs").train
    monkeypatch.setattr(corpora, "_help_topics", dict)
    fails("this Python has neither", "pydocs")


def test_library_docstrings_pass_over_what_is_not_python(monkeypatch, tmp_path):
    (tmp_path / "good.py").write_text('"""A."""\ndef f():\n    """B\n       c."""\n')
    (tmp_path / "bad.py").write_text("def {{name}}(")
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(tmp_path))
    assert corpora._library_docstrings() == {"module good": "A.\n\nB\nc.\n"}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_text_files_and_rows_of_a_folder(tmp_path, suffix):
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    (folder / ("a.txt" + suffix)).write_bytes(COMPRESS[suffix](b"first\r\n"))
    (folder / "deep" / ("b.jsonl" + suffix)).write_bytes(
        COMPRESS[suffix](b'{"text": "two"}\n\n{"text": "thr\\u00e9e"}\n')
    )
    (folder / ("valid.txt" + suffix)).write_bytes(COMPRESS[suffix](b"held\n"))
    (folder / "notes.pdf").write_bytes(b"\xff")
    corpus = load_corpus("text", path=folder)
    assert corpus.train == ["first\r\n", "two", "thrée"]
    assert corpus.validation == ["held\n"]
    assert corpus.separate_documents


def test_a_single_file_is_cut_whatever_its_name(tmp_path):
    (tmp_path / "valid.txt").write_text("line\n" * 40)
    corpus = load_corpus("text", path=tmp_path / "valid.txt")
    assert (corpus.train, corpus.validation) == (["line\n" * 38], ["line\n" * 2])


def test_rows_may_name_another_field(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"body": "a b c"}')
    (tmp_path / "test.jsonl").write_text('{"body": "d"}')
    corpus = load_corpus("text", path=tmp_path, text_field="body")
    assert ("".join(corpus.train + corpus.validation), corpus.test) == ("a b c", ["d"])


@pytest.mark.parametrize("count", [1, 3, 20, 200])
def test_hold_out_loses_nothing_and_takes_about_the_share(count):
    documents = [f"document {index}\n" * (20 + index % 7) for index in range(count)]
    train, held = hold_out(documents, share=0.05)
    assert sorted("".join(train + held).split("\n")) == sorted("".join(documents).split("\n"))
    share = count_bytes(held) / count_bytes(documents)
    assert 0.02 < share < 0.12
    assert hold_out(documents, share=0.05) == (train, held)


def test_hold_out_of_one_line():
    assert hold_out(["abc def ghi"], share=0.3) == (["abc def "], ["ghi"])
    assert hold_out(["abcdefghij"], share=0.2) == (["abcdefgh"], ["ij"])


def test_unknown_source_names_the_nearest():
    fails(r"data.source: expected one of .* found 'wikitxt' \(nearest: wikitext\)", "wikitxt")


@pytest.mark.parametrize("source", ["text", "wikitext", "hf"])
def test_sources_that_need_a_path(source):
    fails(f"data.path: source '{source}' needs", source)


def test_pydocs_takes_no_path():
    fails("source 'pydocs' reads none", "pydocs", path="somewhere")


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, float("nan")])
def test_share_out_of_range(share):
    fails("data.validation_share: expected a number between 0 and 1", "pydocs", validation_share=share)


@pytest.mark.parametrize("source", ["text", "wikitext"])
def test_missing_path(tmp_path, source):
    fails("found nothing at .*absent", source, path=tmp_path / "absent")


def test_wikitext_without_validation(tmp_path):
    (tmp_path / "train.txt").write_text("a b\n")
    fails(r"expected wiki.valid.tokens or valid.txt .* found train.txt", "wikitext", path=tmp_path)


def test_folder_without_text(tmp_path):
    (tmp_path / "notes.pdf").write_text("x")
    fails("expected files .txt, .tokens, .jsonl .* found none", "text", path=tmp_path)
    fails("expected a file .* found .*notes.pdf", "text", path=tmp_path / "notes.pdf")


def test_empty_file(tmp_path):
    (tmp_path / "a.txt").write_text("")
    fails("a.txt is empty", "text", path=tmp_path)
    (tmp_path / "a.txt").write_text(" \n\n")
    fails("has no text", "text", path=tmp_path)


def test_only_a_test_split(tmp_path):
    (tmp_path / "test.txt").write_text("words\n")
    fails("has a test split and no train split", "text", path=tmp_path)


def test_text_too_short_to_hold_any_out(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    fails("split", "text", path=tmp_path)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_undecodable_text_gives_the_byte_offset(tmp_path, suffix):
    file = tmp_path / ("a.txt" + suffix)
    file.write_bytes(COMPRESS[suffix]("é ok ".encode() + b"\xff rest"))
    fails(r"a.txt\S*: expected UTF-8, found byte 0xff at offset 6", "text", path=file)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_files_that_were_compressed_in_pieces(tmp_path, suffix):
    file = tmp_path / ("train.txt" + suffix)
    file.write_bytes(COMPRESS[suffix](b"one\n") + COMPRESS[suffix](b"two\n"))
    assert corpora.read_text(file) == "one\ntwo\n"


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "other"])
def test_damaged_compression(tmp_path, suffix, damage):
    file = tmp_path / ("a.txt" + suffix)
    whole = COMPRESS[suffix](os.urandom(5000).hex().encode())
    file.write_bytes(whole[:-40] if damage == "cut" else b"not compressed at all")
    fails(f"is not a whole {suffix} file", "text", path=file)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "b.jsonl:2: expected a JSON object, found expecting"),
        ("[1]", "b.jsonl:2: expected a JSON object, found list"),
        ('{"body": 1, "a": 2}', "b.jsonl:2: expected text under 'text', found keys a, body"),
        ('{"text": 3}', "b.jsonl:2: expected text under 'text', found int"),
        (json.dumps({"text": "a\ud800"}), r"b.jsonl:2: expected text, found a lone surrogate U\+D800 at character 1"),
    ],
)
def test_bad_row_names_file_and_row(tmp_path, row, message):
    (tmp_path / "b.jsonl").write_text('{"text": "fine"}\n' + row + "\n")
    fails(message, "text", path=tmp_path)


def test_hugging_face_data_set(monkeypatch):
    import datasets

    rows = {"text": [f"row {index}" for index in range(40)] + ["", None]}
    whole = datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows)})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset: whole)
    corpus = load_corpus("hf", path="some/name", subset="raw")
    assert corpus.name == "hf (some/name/raw)"
    assert len(corpus.train) + len(corpus.validation) == 40
    fails("has the columns text, found no 'body'", "hf", path="some/name", text_field="body")


def test_hugging_face_data_set_that_cannot_be_loaded(monkeypatch):
    import datasets

    def refuse(name, subset):
        raise ConnectionError("no network\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    fails("cannot load the Hugging Face data set 'some/name': no network$", "hf", path="some/name")


def test_hidden_files_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("words of a file\n" * 5)
    for name in ("._a.txt", ".hidden.txt", ".git/notes.txt", "__MACOSX/a.txt", "sub/._b.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\xff no text")
    assert "".join(load_corpus("text", path=tmp_path).train) == "words of a file\n" * 4


def test_rows_that_are_deep_or_large(tmp_path):
    file = tmp_path / "a.jsonl"
    for row in (
        '{"text": ' + "[" * 100_000,
        '{"text": ' + "9" * 5_000 + "}",
        '{"text": "a", "text": "b"}',
        '{"' + "k" * 9_000 + '": 1}',
    ):
        file.write_text('{"text": "fine", "score": NaN}\n' + row + "\n")
        with pytest.raises(LeapformerError, match="a.jsonl:2: ") as caught:
            load_corpus("text", path=file)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_column_that_is_no_text_or_too_large(monkeypatch):
    datasets = pytest.importorskip("datasets")
    from leapformer.tasks.lm import corpora

    whole = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": [1, 2], "words": ["a b", "c d"]})})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset: whole)
    fails("expected text under 'text', found 1 in row 0", "hf", path="x")
    monkeypatch.setattr(corpora, "largest_file", lambda: 5)
    fails("expected at most 5 bytes, as the memory allows, found", "hf", path="x", text_field="words")


@pytest.mark.parametrize("name", ["x" * 5_000, "a\0b"])
@pytest.mark.parametrize("source", ["text", "wikitext"])
def test_names_that_no_file_can_have(source, name, tmp_path):
    with pytest.raises(LeapformerError, match="found nothing at") as caught:
        load_corpus(source, path=tmp_path / name)
    assert len(str(caught.value)) < 600
