"""Text, JSON and YAML that may be damaged or hostile, each with a bound on size, depth and expansion.

Every fault is a LeapformerError of one line: where, what was expected, what was found. Nothing else comes out of here.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Mapping
from typing import Any, Literal

from leapformer.errors import LeapformerError, MissingExtra
from leapformer.files.showing import cut, shown

LARGEST = 64 << 20  # bytes of a file that is read whole as text
Numbers = Literal["finite", "null", "any"]

DEEPEST = 64  # lists and mappings inside one another
MOST_NODES = 100_000  # values in a YAML document, those counted again that an alias repeats

_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def kind_of_file(mode: int) -> str:
    """What `stat` calls a thing, in words: "a folder", "a pipe"."""
    return _KINDS.get(stat.S_IFMT(mode), "something else")


def read_bytes(path: str | os.PathLike[str], *, largest: int = LARGEST) -> bytes:
    """The content of a regular file of at most `largest` bytes.

    Raises:
        LeapformerError: there is none, it is a folder, a pipe or a device, it is larger, or it can't be read.
    """
    where = cut(os.fspath(path), 240)
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):  # a pipe would wait for ever
            raise LeapformerError(f"{where}: expected a file, found {kind_of_file(mode)}")
        with open(path, "rb") as file:
            content = file.read(largest + 1)
    except OSError as error:
        raise LeapformerError(f"{where}: cannot be read ({error.strerror or error})") from None
    except ValueError:  # a zero byte in the name
        raise LeapformerError(f"{shown(os.fspath(path))}: expected a file's name, found a zero byte in it") from None
    if len(content) > largest:
        raise LeapformerError(f"{where}: expected at most {largest:,} bytes, found more")
    return content


def read_text(path: str | os.PathLike[str], *, largest: int = LARGEST, errors: str = "strict") -> str:
    """The UTF-8 text of a regular file, line ends untouched.

    Arguments:
        errors: as of `bytes.decode`.

    Raises:
        LeapformerError: as `read_bytes`, or it is not UTF-8.
    """
    content = read_bytes(path, largest=largest)
    try:
        return content.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise LeapformerError(
            f"{cut(os.fspath(path), 240)}: expected UTF-8, "
            f"found byte 0x{content[error.start]:02x} at offset {error.start}"
        ) from None


# ---- JSON


def read_json(path: str | os.PathLike[str], *, largest: int = LARGEST, numbers: Numbers = "finite") -> Any:
    """The value in a JSON file.

    Arguments:
        numbers: as for `parse_json`.

    Raises:
        LeapformerError: as `read_text` and `parse_json`.
    """
    where = cut(os.fspath(path), 240)
    return parse_json(read_text(path, largest=largest), where=where, numbers=numbers)


def read_json_object(
    path: str | os.PathLike[str], *, largest: int = LARGEST, numbers: Numbers = "finite"
) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        LeapformerError: as `read_json`, or the value is of another kind.
    """
    value = read_json(path, largest=largest, numbers=numbers)
    if not isinstance(value, dict):
        raise LeapformerError(
            f"{cut(os.fspath(path), 240)}: expected a JSON object, found {type(value).__name__} {shown(value)}"
        )
    return value


def parse_json(
    text: str, *, where: str, expected: str = "JSON", numbers: Numbers = "finite", surrogates: bool = False
) -> Any:
    """The value of a JSON text: strict, so no NaN, no number beyond a float, no key twice, no text that UTF-8 can't
    hold, at most `DEEPEST` deep.

    Arguments:
        expected: what messages call it.
        numbers: "finite", or what becomes of NaN, infinity and numbers beyond a float, which many programs write:
            "null" takes them as None, "any" as they are.
        surrogates: take halves of surrogate pairs; the caller looks at the texts it takes.

    Raises:
        LeapformerError: it is something else; begins with `where`.
    """
    try:
        value = _DECODERS[numbers].decode(text)
    except json.JSONDecodeError as error:
        raise LeapformerError(
            f"{where}: expected {expected}, found {error.msg[:1].lower()}{error.msg[1:]} at line {error.lineno} "
            f"column {error.colno}"
        ) from None
    except RecursionError:
        raise LeapformerError(f"{where}: expected {expected} at most {DEEPEST} deep, found more") from None
    except ValueError as error:  # ours below, and Python's on integers of over 4,300 digits
        raise LeapformerError(f"{where}: expected {expected}, found {cut(error)}") from None
    _check_depth(value, where, expected)
    if not surrogates:
        _check_texts(value, where)
    return value


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {cut(text, 30)}, which is too large")
    return number


def _constant(text: str) -> float:
    raise ValueError(f"{text}, which JSON doesn't have")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {shown(key)} twice")
            seen.add(key)
    return found


_DECODERS: dict[Numbers, json.JSONDecoder] = {
    "finite": json.JSONDecoder(parse_float=_float, parse_constant=_constant, object_pairs_hook=_object),
    "null": json.JSONDecoder(
        parse_float=lambda text: _finite(float(text)), parse_constant=lambda text: None, object_pairs_hook=_object
    ),
    "any": json.JSONDecoder(object_pairs_hook=_object),
}


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _check_depth(value: Any, where: str, expected: str) -> None:
    """Without recursion, level by level."""
    level = [value]
    for _ in range(DEEPEST + 1):
        if not level:
            return
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    raise LeapformerError(f"{where}: expected {expected} at most {DEEPEST} deep, found more")


def _check_texts(value: Any, where: str) -> None:
    """JSON and YAML can spell half of a surrogate pair, which no file and no terminal takes."""
    level = [value]
    while level:
        inner: list[Any] = []
        for each in level:
            if isinstance(each, str) and not each.isascii():
                try:
                    each.encode("utf-8")
                except UnicodeEncodeError as error:
                    raise LeapformerError(
                        f"{where}: expected text, found a lone surrogate U+{ord(each[error.start]):04X}"
                    ) from None
            elif isinstance(each, dict):
                inner += [*each.keys(), *each.values()]
            elif isinstance(each, list):
                inner += each
        level = inner


# ---- YAML


def read_yaml(path: str | os.PathLike[str], *, largest: int = 1 << 20, most_nodes: int = MOST_NODES) -> Any:
    """The value in a YAML file.

    Raises:
        LeapformerError: as `read_text` and `parse_yaml`.
    """
    return parse_yaml(read_text(path, largest=largest), where=cut(os.fspath(path), 240), most_nodes=most_nodes)


def parse_yaml(text: str, *, where: str, most_nodes: int = MOST_NODES, with_rows: bool = False) -> Any:
    """The value of a YAML text, with the plain values of YAML 1.2: null, true, false, decimal numbers, else text.

    So 010, 1:30, 2020-01-01, yes and off are text; a field of a recipe that expects a number or a truth value may still
    take them. A key twice in one mapping is a fault.

    Arguments:
        with_rows: a fault's place is told as "WHERE:ROW", not behind it.

    Raises:
        LeapformerError: it is no YAML, deeper than `DEEPEST`, or of more than `most_nodes` values; begins with `where`.
    """
    try:
        import yaml
    except ImportError:
        raise MissingExtra("lm", package="PyYAML", purpose="reading YAML") from None
    try:
        _check_events(yaml, text, where, most_nodes)
        value = yaml.load(text, Loader=_yaml_loader(yaml))
    except yaml.MarkedYAMLError as error:
        row = 1 if error.problem_mark is None else error.problem_mark.line + 1
        before, behind = (f"{where}:{row}", "") if with_rows else (where, f" at line {row}")
        raise LeapformerError(
            f"{before}: expected YAML, found {cut(error.problem or error.context, 120).removeprefix('found ')}{behind}"
        ) from None
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        # PyYAML lets through what its constructors meet in values such as `!!int ""`.
        raise LeapformerError(f"{where}: expected YAML, found {cut(error, 120) or type(error).__name__}") from None
    _check_texts(value, where)
    return value


def is_plain_value(text: str) -> bool:
    """Whether YAML takes a plain text as null, a truth value or a number."""
    return any(re.fullmatch(pattern, text) for pattern, _ in _PLAIN.values())


def _check_events(yaml: Any, text: str, where: str, most_nodes: int) -> None:
    """Bounds on depth and size, read off the parser's events: building the values recurses, in C without a limit."""
    sizes: dict[str, int] = {}  # of what an anchor names
    open_nodes: list[list[Any]] = []  # of each list or mapping around: [its anchor, its nodes before it began]
    nodes = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent):
            nodes += sizes.get(event.anchor, 1)  # an alias of what it stands in has no size yet
            if any(anchor == event.anchor for anchor, _ in open_nodes):
                raise LeapformerError(
                    f"{where}: expected YAML, found a value that holds itself (*{cut(event.anchor, 30)})"
                )
        elif isinstance(event, yaml.ScalarEvent):
            nodes += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append([event.anchor, nodes])
            nodes += 1
            if len(open_nodes) > DEEPEST:
                raise LeapformerError(f"{where}: expected YAML at most {DEEPEST} deep, found more")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = nodes - before
        if nodes > most_nodes:
            raise LeapformerError(f"{where}: expected YAML of at most {most_nodes:,} values, found more")


_PLAIN = {
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "tag:yaml.org,2002:int": (r"[-+]?(0|[1-9][0-9]{0,4000})", list("-+0123456789")),
    "tag:yaml.org,2002:float": (
        r"[-+]?((0|[1-9][0-9]*)?\.[0-9]+|(0|[1-9][0-9]*)\.)([eE][-+]?[0-9]+)?|[-+]?(0|[1-9][0-9]*)[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
}
_loaders: list[Any] = []


def _yaml_loader(yaml: Any) -> Any:
    """PyYAML's safe loader in C, with the plain values above, and no key twice. Made once, when YAML is first read."""
    if _loaders:
        return _loaders[0]
    base = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(base):
        yaml_implicit_resolvers: dict[str, list[Any]] = {}

        def construct_mapping(self, node: Any, deep: bool = False) -> Mapping[Any, Any]:
            seen = set()
            for key, _ in node.value:
                name = (key.tag, key.value) if isinstance(key.value, str) else None
                if name is not None and name in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {cut(key.value, 30)!r} twice", key.start_mark
                    )
                seen.add(name)
            return super().construct_mapping(node, deep)

    for tag, (pattern, first) in _PLAIN.items():
        Loader.add_implicit_resolver(tag, re.compile(f"^(?:{pattern})$"), first)
    # Tags spelled out make nothing else than JSON has: no dates, sets, bytes or ordered pairs.
    kept = {None, *_PLAIN, *(f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map"))}
    Loader.yaml_constructors = {tag: make for tag, make in base.yaml_constructors.items() if tag in kept}
    Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))
    Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: _yaml_float(loader.construct_scalar(node)))
    _loaders.append(Loader)
    return Loader


def _yaml_float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
