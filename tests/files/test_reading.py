"""The readers of text, JSON and YAML: right values, and one line for everything else."""

from __future__ import annotations

import os

import pytest

from leapformer.errors import LeapformerError
from leapformer.files.reading import (
    DEEPEST,
    parse_json,
    parse_yaml,
    read_bytes,
    read_json,
    read_json_object,
    read_text,
    read_yaml,
)


def refusal(read, *arguments, **options) -> str:
    with pytest.raises(LeapformerError) as caught:
        read(*arguments, **options)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 500
    return line


def test_text_is_read_as_it_is(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("é\r\nb\n".encode())
    assert read_text(path) == "é\r\nb\n" and read_bytes(path) == "é\r\nb\n".encode()
    path.write_bytes(b"ab\xff")
    assert "expected UTF-8, found byte 0xff at offset 2" in refusal(read_text, path)
    assert read_text(path, errors="surrogateescape") == "ab\udcff"
    assert "expected at most 2 bytes, found more" in refusal(read_bytes, path, largest=2)


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    assert "expected a file, found a pipe" in refusal(read_text, tmp_path / "pipe")
    assert "expected a file, found a folder" in refusal(read_text, tmp_path)
    assert "expected a file, found a device" in refusal(read_text, "/dev/zero")
    assert "No such file" in refusal(read_text, tmp_path / "none")
    assert "cannot be read" in refusal(read_text, tmp_path / "loop")
    assert "File name too long" in refusal(read_text, tmp_path / ("x" * 5000))
    assert "zero byte" in refusal(read_text, "a\0b")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "expecting value"),
        ("{", "line 1 column 2"),
        ("[" * 100_000, f"at most {DEEPEST} deep"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), f"at most {DEEPEST} deep"),
        ("9" * 5000, "4300 digits"),
        ("NaN", "NaN, which JSON doesn't have"),
        ("-Infinity", "-Infinity, which JSON doesn't have"),
        ("1e999", "too large"),
        ('{"a": 1, "a": 2}', "the key 'a' twice"),
        ('["\\ud800"]', "a lone surrogate U+D800"),
        ('{"\\ud800": 1}', "a lone surrogate U+D800"),
    ],
)
def test_what_is_no_json(text, found):
    line = refusal(parse_json, text, where="here")
    assert line.startswith("here: ") and found in line


def test_json():
    assert parse_json('{"a": [1, 2.5, null, "\\u00e9"]}', where="here") == {"a": [1, 2.5, None, "é"]}
    assert parse_json("[NaN, -Infinity, 1]", where="here", numbers="null") == [None, None, 1]


def test_json_files(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[1]")
    assert read_json(path) == [1]
    assert "expected a JSON object, found list [1]" in refusal(read_json_object, path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", "010"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("2020-99-99", "2020-99-99"),
        ("yes", "yes"),
        ("off", "off"),
        ("", None),
        ("~", None),
        ("true", True),
        ("3e-3", 0.003),
        (".5", 0.5),
        ("-2", -2),
        ("<<", "<<"),
        ("[a, 'b #2']", ["a", "b #2"]),
        ("- &a [x]\n- *a", [["x"], ["x"]]),
        ("/a/My Data #2", "/a/My Data"),
    ],
)
def test_yaml_has_the_plain_values_of_its_version_1_2(text, value):
    found = parse_yaml(text, where="here")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a: 1\nb: 2\na: 3", "the key 'a' twice at line 3"),
        ("- " * 100, f"at most {DEEPEST} deep"),
        ("[" * 100_000, f"at most {DEEPEST} deep"),
        ("&a [*a]", "a value that holds itself (*a)"),
        (
            "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)),
            "values, found more",
        ),
        ("!!python/object/apply:os.system [x]", "could not determine a constructor"),
        ("!!timestamp 2020-99-99", "could not determine a constructor"),
        ("!!int 1:30", "invalid literal"),
        ("!!int ''", "invalid literal"),
        ("!!bool x", "expected YAML"),
        ("? {a: 1}\n: 2", "unhashable key"),
        ("a: [1", "did not find expected"),
        ("a\0", "unacceptable character"),
        ("--- a\n--- b", "another document"),
        ("*x", "undefined alias"),
    ],
)
def test_what_is_no_yaml(text, found):
    line = refusal(parse_yaml, text, where="here")
    assert line.startswith("here: ") and found in line


def test_yaml_files(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: {b: 1}\n")
    assert read_yaml(path) == {"a": {"b": 1}}
    path.write_text("a: " * 600_000)
    assert "expected at most 1,048,576 bytes" in refusal(read_yaml, path)
