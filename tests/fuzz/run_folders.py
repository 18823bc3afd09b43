"""Damaged and hostile run folders through every command that takes one.

A case damages one to three files of a small good run and calls the command in this process. It must end with 0, or with
2 and one line; nothing of the folder is executed, nothing outside of it is written, nothing is fetched.
"""

from __future__ import annotations

import functools
import io
import json
import os
import random
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import yaml

from tests.fuzz.harness import Wrong

SECONDS = 60
CASES = {"short": 60, "full": 3000}
LONGEST = 1000

KINDS = ("lm", "lm", "unfinished", "lra", "simulst", "start", "recipe")
# What a training may still need, and what is never read back.
UNTOUCHED = ("tensorboard",)


def case(seed: int, number: int, folder: Path) -> str:
    """One damaged run through one command."""
    draw = random.Random(f"{seed} {number}")
    kind = draw.choice(KINDS)
    outside = folder / "outside"
    outside.mkdir()
    (outside / "secret.json").write_text('{"splits": {}, "secret": 1}')
    (outside / "data.bin").write_bytes(bytes(range(256)) * 8)
    executed = folder / "executed"
    place = folder / "work"
    place.mkdir()
    arguments, damaged = PREPARE[kind](draw, place)
    told = []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        files = sorted(
            path for path in damaged.rglob("*") if not path.is_dir() and not set(path.parts) & set(UNTOUCHED)
        )
        if damaged.is_file():
            files = [damaged]
        if files:
            told.append(damage(draw, draw.choice(files), outside, executed))
    before = snapshot(outside)
    code, error = call(arguments)
    what = f"{' '.join(arguments[:2])}; {'; '.join(told)}"
    if executed.exists():
        raise Wrong(f"{what}: code of the folder was executed")
    if snapshot(outside) != before:
        raise Wrong(f"{what}: something outside of the folder was changed")
    if code == 0:
        return "went through"
    check_refusal(code, error, what)
    return "refused in one line"


# ---- the command


def call(arguments: list[str]) -> tuple[int, str]:
    """The exit code of the command and what it wrote on the error output."""
    from leapformer.cli import main

    error, stdin = io.StringIO(), sys.stdin
    sys.stdin = io.StringIO("")
    try:
        with no_network(), redirect_stdout(io.StringIO()), redirect_stderr(error):
            code = main(arguments)
    except SystemExit as stop:
        raise Wrong(f"{arguments[0]}: SystemExit {stop.code}") from None
    finally:
        sys.stdin = stdin
    return code, error.getvalue()


@contextmanager
def no_network():
    """Every connection is a fault."""
    connect, resolve = socket.socket.connect, socket.getaddrinfo

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise Wrong(f"the network was asked for {arguments[-1]!r:.80}")

    socket.socket.connect, socket.getaddrinfo = refuse, refuse  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        socket.socket.connect, socket.getaddrinfo = connect, resolve  # type: ignore[method-assign]


def check_refusal(code: int, error: str, what: str) -> None:
    lines = [line.rsplit("\r", 1)[-1] for line in error.split("\n")]
    lines = [line for line in lines if line.strip() and "%|" not in line and "it/s" not in line and "it [" not in line]
    if code != 2:
        raise Wrong(f"{what}: exit code {code}: {lines[-1:]}")
    first = next((place for place, line in enumerate(lines) if line.startswith("leapformer: ")), None)
    if first is None or "Traceback" in error:
        raise Wrong(f"{what}: expected a line 'leapformer: ...', found {lines[-1:]}")
    if max(map(len, lines)) > LONGEST:
        raise Wrong(f"{what}: a line of {max(map(len, lines))} characters")
    several = lines[first].endswith(" faults")
    notes = [line for line in lines[:first] if not any(note in line for note in NOTES)]
    if notes or (len(lines) > first + 1 and not several):
        raise Wrong(f"{what}: expected one line, found {len(lines)}: {lines[:3]}")


# What commands say on the error output while they work: which run is trained, which file is not what was saved.
NOTES = ("listops, ", "SHA256SUMS", "damaged")


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


# ---- good runs, made once in each process


@functools.cache
def good() -> Path:
    """A folder of good runs: lm, unfinished, lra/listops/leap-seed0, simulst, and their data."""
    from leapformer.tasks.lra.preparation import prepare
    from leapformer.tasks.registry import load_recipe
    from leapformer.training.train import train
    from tests.tasks.simulst import builders as simulst
    from tests.training import builders as lm

    folder = Path(tempfile.mkdtemp(prefix="leapformer-fuzz-good-"))
    data = folder / "data"
    data.mkdir()
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        train(*lm.tiny_recipe(data, "max_steps=4"), folder / "lm")
        shutil.copytree(folder / "lm", folder / "unfinished")
        (folder / "unfinished" / "results.json").unlink()
        shutil.rmtree(folder / "unfinished" / "checkpoints" / "checkpoint-4")
        prepare("listops", data / "lra-listops-cpu", count=20, workers=1, min_length=20, max_length=60)
        overrides = [f"data.path={data / 'lra-listops-cpu'}", *ARENA]
        lra = folder / "lra" / "listops" / "leap-seed0"
        train(*load_recipe("lra/listops-cpu", overrides), lra)
        results = json.loads((lra / "results.json").read_text())
        results["splits"]["test"] = results["splits"]["validation"]
        (lra / "results.json").write_text(json.dumps(results))
        (data / "simulst").mkdir()
        train(*simulst.tiny_recipe(data / "simulst", "max_steps=2"), folder / "simulst")
        assert call(["evaluate", str(folder / "simulst"), "--k", "1,3", "--batched"])[0] == 0
    return folder


# Makes a run of Long-Range Arena small.
ARENA = (
    "hidden_size=16",
    "intermediate_size=32",
    "num_hidden_layers=1",
    "classifier_hidden_size=8",
    "batch_size=4",
    "max_steps=2",
    "warmup_steps=1",
    "eval_every=2",
    "save_every=2",
    "eval_tokens=600",
    "device=cpu",
)


def copy(name: str, place: Path) -> Path:
    """A good run with the cache beside it."""
    run = place / "runs" / name
    shutil.copytree(good() / name, run)
    for cache in (good() / name).parent.glob(".cache"):
        shutil.copytree(cache, run.parent / ".cache", dirs_exist_ok=True)
    return run


def lm_case(draw: random.Random, place: Path) -> tuple[list[str], Path]:
    run = copy("lm", place)
    commands = [
        ["evaluate", str(run)],
        ["evaluate", str(run), "--context-window", "3"],
        ["compare", str(run), "--output", str(place / "page.html")],
        ["compare", str(run), str(good() / "lm"), "--markdown"],
        ["generate", str(run), "the cat", "--tokens", "5"],
        ["plot", "proportions", str(run)],
        ["plot", "proportions", str(run), "--text", "the cat"],
        ["translate", str(run), "-"],
    ]
    return draw.choice(commands), run


def unfinished_case(draw: random.Random, place: Path) -> tuple[list[str], Path]:
    run = copy("unfinished", place)
    return ["train", str(good() / "data" / "tiny.yaml"), "max_steps=4", "--output", str(run)], run


def lra_case(draw: random.Random, place: Path) -> tuple[list[str], Path]:
    shutil.copytree(good() / "lra", place / "lra")
    run = place / "lra" / "listops" / "leap-seed0"
    table = ["lra", "--tasks", "listops", "--attention", "leap", "--output", str(place / "lra")]
    changes = [word for change in ARENA for word in ("--set", change)]
    commands = [
        ["evaluate", str(run)],
        ["evaluate", str(run), "--split", "test"],
        ["compare", str(run), "--split", "test"],
        [*table, "--only-table"],
        [*table, "--size", "cpu", "--data", str(good() / "data"), *changes],
    ]
    return draw.choice(commands), run


def simulst_case(draw: random.Random, place: Path) -> tuple[list[str], Path]:
    run = copy("simulst", place)
    text = place / "text.en"
    text.write_text("The dog sees the tree.\nThe man knows the apple.\n")
    commands = [
        ["evaluate", str(run)],
        ["evaluate", str(run), "--k", "1", "--batched", "--limit", "3"],
        ["evaluate", str(run), "--k", "2", "--limit", "2"],
        ["translate", str(run), str(text), "--k", "1"],
        ["translate", str(run), str(text), "--policy", "local-agreement", "--json"],
        ["plot", "latency", str(run), "--draws", "20", "--output", str(place / "latency")],
        ["plot", "latency", str(good() / "simulst"), str(run), "--draws", "5", "--output", str(place / "latency")],
        ["compare", str(run), "--output", str(place / "page.html")],
    ]
    return draw.choice(commands), run


def start_case(draw: random.Random, place: Path) -> tuple[list[str], Path]:
    """A training that starts from the damaged run."""
    run = copy("simulst", place)
    recipe = good() / "data" / "simulst" / "tiny.yaml"
    take = draw.choice(("all", "encoder"))
    command = [
        "train",
        str(recipe),
        "max_steps=1",
        f"start.run={run}",
        f"start.take={take}",
        "--output",
        str(place / "run"),
    ]
    return command, run


def recipe_case(draw: random.Random, place: Path) -> tuple[list[str], Path]:
    """A recipe file of its own, trained for a step at most."""
    path = place / "recipe.yaml"
    source = draw.choice((good() / "data" / "tiny.yaml", good() / "lm" / "recipe.yaml"))
    shutil.copy(source, path)
    return ["train", str(path), "max_steps=1", "--output", str(place / "run")], path


PREPARE: dict[str, Callable[[random.Random, Path], tuple[list[str], Path]]] = {
    "lm": lm_case,
    "unfinished": unfinished_case,
    "lra": lra_case,
    "simulst": simulst_case,
    "start": start_case,
    "recipe": recipe_case,
}


# ---- damage


def damage(draw: random.Random, path: Path, outside: Path, executed: Path) -> str:
    """Damage one file, and say how."""
    if path.is_symlink() or not path.is_file():  # through a link the damage would be done elsewhere
        return f"{path.name} is gone already"
    ways: list[Callable[..., None]] = [cut_off, flipped, replaced, swapped]
    if path.suffix in (".json", ".yaml", ".jsonl", ".log"):
        ways += [changed] * 8 + [textual, bombed]
    if path.name in ("tokenizer_config.json", "config.json"):
        ways += [hostile] * 3
    way = draw.choice(ways)
    way(draw, path, outside, executed)
    return f"{path.name} {way.__name__}"


def cut_off(draw: random.Random, path: Path, outside: Path, executed: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content) + 1)])


def flipped(draw: random.Random, path: Path, outside: Path, executed: Path) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 4, 40))):
        if content:
            content[draw.randrange(min(len(content), draw.choice((200, 10**9))))] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(content))


def replaced(draw: random.Random, path: Path, outside: Path, executed: Path) -> None:
    """By something else than a file, or by nothing."""
    path.unlink()
    way = draw.randrange(8)
    if way == 0:
        path.mkdir()
    elif way == 1:
        os.mkfifo(path)
    elif way == 2:
        path.symlink_to(outside / draw.choice(("secret.json", "data.bin", "not-there")))
    elif way == 3:
        path.write_bytes(b"")
    elif way == 4:
        path.write_bytes(draw.randbytes(draw.choice((1, 100, 5000))))
    elif way == 5:
        path.symlink_to(draw.choice(("/dev/zero", "/dev/full", "/proc/self/mem", path.name)))
    elif way == 6:
        path.symlink_to(outside)


def swapped(draw: random.Random, path: Path, outside: Path, executed: Path) -> None:
    """With a file of the same name out of another run, or of another name out of this one."""
    others = [other for other in good().rglob("*") if other.is_file() and "data" not in other.parts]
    same = [other for other in others if other.name == path.name]
    shutil.copy(draw.choice(same if same and draw.random() < 0.7 else others), path)


def changed(draw: random.Random, path: Path, outside: Path, executed: Path) -> None:
    """A value or a key somewhere in it."""
    text = path.read_text(errors="replace")
    try:
        if path.suffix == ".yaml":
            value = yaml.safe_load(text)
        elif path.suffix == ".json":
            value = json.loads(text)
        else:
            value = [json.loads(line) for line in text.splitlines()]
    except (ValueError, yaml.YAMLError, RecursionError):
        return
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        value = change(draw, value)
    if path.suffix == ".yaml":
        path.write_text(yaml.safe_dump(value, sort_keys=False))
    elif path.suffix == ".json":
        path.write_text(json.dumps(value))
    elif isinstance(value, list):
        path.write_text("".join(json.dumps(row) + "\n" for row in value))


def change(draw: random.Random, value: Any) -> Any:
    """One place in a value, changed."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        way = draw.random()
        if way < 0.7:
            return {**value, key: change(draw, value[key])}
        if way < 0.8:
            return {name: each for name, each in value.items() if name != key}
        if way < 0.9:
            return {(f"{name}x" if name == key else name): each for name, each in value.items()}
        return {**value, draw.choice(("new", "", "\u00e9", "to_dict", "forward")): strange(draw)}
    if isinstance(value, list) and value and draw.random() < 0.9:
        place = draw.randrange(len(value))
        way = draw.random()
        if way < 0.7:
            return [change(draw, each) if n == place else each for n, each in enumerate(value)]
        if way < 0.85:
            return value[:place] + value[place + 1 :]
        return [*value, value[place]]
    if isinstance(value, bool) or value is None or draw.random() < 0.6:
        return strange(draw)
    if isinstance(value, int | float):
        return draw.choice((-value, value + 1, value * 2, value * 10**6, 0, 1, 0.5, str(value)[:100]))
    if isinstance(value, str):
        return draw.choice((value + "x", value[:-1], value.upper(), value + "\n\x1b[31m$\\bad$", "[/]" + value, ""))
    return strange(draw)


def strange(draw: random.Random) -> Any:
    """A value of a kind that nobody expects."""
    deep: Any = 1
    for _ in range(draw.choice((10, 70, 300))):
        deep = [deep]
    return draw.choice(
        (
            None,
            True,
            False,
            0,
            1,
            -1,
            10**9,
            10**15,
            10**30,
            -(10**400),
            1.5,
            -0.5,
            1e300,
            1e-300,
            float("nan"),
            float("inf"),
            "",
            "x",
            "../../outside/secret.json",
            "/etc/passwd",
            "a\0b",
            "\ud800",
            "y" * 5000,
            [],
            {},
            [1],
            {"a": 1},
            [[]],
            deep,
            list(range(1000)),
            "true",
            "1e999",
            "softmax",
            "leap",
            "hf",
        )
    )


def textual(draw: random.Random, path: Path, outside: Path, executed: Path) -> None:
    """A piece of text put in, taken out or doubled."""
    text = path.read_text(errors="replace")
    place = draw.randrange(len(text) + 1)
    piece = draw.choice(
        ("{", "]", "\0", "\ufeff", "NaN", '"', "\n", "\t", "&a *a", "!!python/name:os.system", "9" * 6000)
    )
    length = draw.choice((0, 0, 1, 20))
    text = text[:place] + piece + text[place + length :] if draw.random() < 0.7 else text + text
    path.write_text(text)


def bombed(draw: random.Random, path: Path, outside: Path, executed: Path) -> None:
    """Small files that would become large."""
    aliases = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9))
    path.write_text(
        draw.choice(
            (
                "[" * 100_000,
                '{"a":' * 100_000,
                "[" * 60 + "]" * 60,
                "- " * 50_000,
                "a0: &a0 [x]\n" + aliases + "task: *a8\n",
                "task: lm\nname: &a [*a]\n",
                '{"splits": ' + "9" * 5000 + "}",
                "a: " * 30_000,
                "{}",
                "[]",
                "null",
                '{"step": 1}\n' * 50_000,
            )
        )
    )


def hostile(draw: random.Random, path: Path, outside: Path, executed: Path) -> None:
    """Code beside it, and keys that ask for it."""
    code = f"open({str(executed)!r}, 'w').close()\nclass Evil:\n    pass\n"
    (path.parent / "evil.py").write_text(code)
    if draw.random() < 0.5:
        (path.parent / "custom_generate").mkdir(exist_ok=True)
        (path.parent / "custom_generate" / "generate.py").write_text(code)
    if draw.random() < 0.3:
        adapter = {"base_model_name_or_path": "somebody/model", "peft_type": "LORA"}
        (path.parent / "adapter_config.json").write_text(json.dumps(adapter))
    if draw.random() < 0.3:
        index = {"weight_map": {"x": "../../../outside/data.bin"}, "metadata": {}}
        (path.parent / "model.safetensors.index.json").write_text(json.dumps(index))
    try:
        content = json.loads(path.read_text())
    except ValueError:
        return
    keys = [
        (
            "auto_map",
            {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"},
        ),
        ("auto_map", {"AutoTokenizer": ["somebody/repo--evil.Evil", None]}),
        ("tokenizer_class", "Evil"),
        ("chat_template", "{{ ''.__class__.__mro__ }}"),
        ("attn_implementation", "kernels-community/flash-attn"),
        ("_attn_implementation", "kernels-community/flash-attn"),
        ("quantization_config", {"quant_method": "bitsandbytes"}),
        ("transformers_weights", "../../../outside/data.bin"),
        ("name_or_path", "somebody/model"),
        ("tokenizer_file", str(outside / "secret.json")),
        ("architectures", ["Evil"]),
        ("custom_generate", "somebody/repo"),
        ("dtype", "manual_seed"),
        ("_commit_hash", "x"),
        ("fusion_config", {"a": True}),
        ("length_limit", 3),
        ("use_kernels", True),
        ("num_labels", 10**9),
        ("id2label", {"0": "x"}),
        ("is_encoder_decoder", True),
    ]
    if isinstance(content, dict):
        for key, value in draw.sample(keys, draw.choice((1, 2))):
            content[key] = value
        path.write_text(json.dumps(content))
