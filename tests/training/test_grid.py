"""Grids: how options become cells, and what is refused."""

from __future__ import annotations

import pytest

from leapformer.errors import LeapformerError
from leapformer.training.grid import (
    Cell,
    GridError,
    expand,
    parse_axis,
    parse_bundle,
    same_key,
    shortened,
    split_outside,
)
from leapformer.training.recipes import TrainingSection


@pytest.mark.parametrize(
    ("text", "separators", "parts"),
    [
        ("a,b,c", ",", ["a", "b", "c"]),
        ("", ",", [""]),
        ("a,,b", ",", ["a", "", "b"]),
        ("[leap, softmax],leap", ",", ["[leap, softmax]", "leap"]),
        ("[[1, 2], [3]],{a: 1, b: 2}", ",", ["[[1, 2], [3]]", "{a: 1, b: 2}"]),
        ("\"a,b\",'c,d',e", ",", ['"a,b"', "'c,d'", "e"]),
        ('a="x y" b=2', " ", ['a="x y"', "b=2"]),
        ("it's,there", ",", ["it's", "there"]),  # an apostrophe opens nothing
        ("[a,b", ",", ["[a,b"]),
    ],
)
def test_brackets_and_quotes_keep_their_separators(text, separators, parts):
    assert split_outside(text, separators) == parts


def test_an_axis_is_a_cell_for_each_value():
    assert parse_axis("learning_rate=1e-3, 2e-3") == [
        Cell("learning_rate=1e-3", ("learning_rate=1e-3",)),
        Cell("learning_rate=2e-3", ("learning_rate=2e-3",)),
    ]
    for wrong in ("attention", "attention=", "=leap", "attention=leap,,softmax"):
        with pytest.raises(LeapformerError, match="--vary: expected key=value,value, found"):
            parse_axis(wrong)


def test_a_bundle_is_one_cell_with_several_keys():
    cell = parse_bundle("softmax + conv: attention=[softmax, leap]  conv_width=4")
    assert cell == Cell("softmax + conv", ("attention=[softmax, leap]", "conv_width=4"))
    assert cell.keys == ["attention", "conv_width"]
    assert parse_bundle("as it is:") == Cell("as it is", ())
    assert parse_bundle("a: path=C:/x") == Cell("a", ("path=C:/x",))
    for wrong in ("softmax", ": a=1", "a: b", "a: =1", "a\x1b: b=1"):
        with pytest.raises(LeapformerError, match="--cell: expected 'name: key=value key=value', found"):
            parse_bundle(wrong)


def test_cells_are_the_product_of_the_options():
    cells = expand(["x=1,2", "y=3,4"], ["a: p=0 q=1", "b:"])
    assert [cell.name for cell in cells] == [
        "a,x=1,y=3",
        "a,x=1,y=4",
        "a,x=2,y=3",
        "a,x=2,y=4",
        "b,x=1,y=3",
        "b,x=1,y=4",
        "b,x=2,y=3",
        "b,x=2,y=4",
    ]
    assert cells[1].overrides == ("p=0", "q=1", "x=1", "y=4") and cells[4].overrides == ("x=1", "y=3")
    assert [cell.name for cell in expand(["x=1,2"], [])] == ["x=1", "x=2"]
    assert [cell.name for cell in expand([], ["a:", "b: x=1"])] == ["a", "b"]


def test_folders_are_names_for_any_file_system():
    assert Cell("attention=leap,lr=1e-3").folder(2) == "attention=leap,lr=1e-3-seed2"
    assert Cell("softmax / conv 4").folder(0) == "softmax_conv_4-seed0"
    assert Cell(".cache").folder(0) == "_.cache-seed0"


@pytest.mark.parametrize(
    ("varied", "bundles", "fault"),
    [
        ([], [], "expected at least one --vary or --cell, found none"),
        (["x=1,1"], [], "x=1: expected each value and each name once, found it 2 times"),
        ([], ["a: x=1", "a: x=2"], "a: expected each value and each name once, found it 2 times"),
        ([], ["a: x=1 x=2"], "a: x: expected each key once, found it 2 times"),
        (["seed=1", "training.seed=2"], [], "training.seed: expected in one --vary, or in the --cell options"),
        (["x=1,2"], ["a: x=1"], "x: expected in one --vary, or in the --cell options, found in two places"),
        (["x=" + ",".join(map(str, range(200))), "y=" + ",".join(map(str, range(200)))], [], "found 40,000"),
    ],
)
def test_what_does_not_go_together_is_refused(varied, bundles, fault):
    with pytest.raises(GridError) as caught:
        expand(varied, bundles)
    assert fault in str(caught.value) and "\n" not in str(caught.value)


def test_all_faults_of_the_options_are_told_at_once():
    with pytest.raises(GridError) as caught:
        expand(["x", "y=1"], ["z"])
    assert [line.split(":")[0].strip() for line in str(caught.value).split("\n")] == ["ablate", "--cell", "--vary"]


def test_keys_are_the_same_with_and_without_their_section():
    assert same_key("seed", "training.seed") and same_key("training.seed", "seed") and same_key("a", "a")
    assert not same_key("seed", "training.reseed") and not same_key("data.path", "model.path")


def test_a_shorter_run_has_everything_in_proportion_and_a_longer_one_what_the_recipe_says():
    section = TrainingSection(max_steps=500, warmup_steps=50, log_every=20, eval_every=100, save_every=250)
    assert shortened(section, 50) == [
        "training.max_steps=50",
        "training.warmup_steps=5",
        "training.log_every=2",
        "training.eval_every=10",
        "training.save_every=25",
    ]
    assert shortened(section, 4) == [
        "training.max_steps=4",
        "training.warmup_steps=0",
        "training.log_every=1",
        "training.eval_every=1",
        "training.save_every=2",
    ]
    assert shortened(section, 1000) == [
        "training.max_steps=1000",
        "training.warmup_steps=50",
        "training.log_every=20",
        "training.eval_every=100",
        "training.save_every=250",
    ]
