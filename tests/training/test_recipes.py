"""Recipes: overrides, faults told all at once, names, fingerprints."""

from __future__ import annotations

import os

import pytest
import yaml

from leapformer.errors import LeapformerError
from leapformer.models import LeapformerTranslationConfig
from leapformer.tasks.model_section import build_config
from leapformer.tasks.registry import get_task, load_recipe
from leapformer.training.recipes import RecipeError, as_override, expand_path, parse_value, read_recipe, recipe_names
from leapformer.training.train import train

from .builders import tiny_content, tiny_recipe, write_recipe


def test_every_recipe_of_the_package_is_valid():
    arena = [
        f"lra/{name}{kind}"
        for name in ("image", "listops", "pathfinder", "retrieval", "text")
        for kind in ("", "-base", "-cpu")
    ]
    language = ["lm/pydocs-tiny", "lm/wikitext103", "lm/wikitext2-base", "lm/wikitext2-small"]
    speech = ["demo", "demo-long", "multi30k-en-de", "multi30k-fr-en", "mustc-en-de", "covost-fr-en"]
    translation = [f"simulst/{name}{stage}" for name in speech for stage in ("", "-transcription")]
    translation += ["simulst/tuxpaint-fr-en", "simulmt/demo", "simulmt/multi30k-en-de"]
    kinds = ["addition", "brackets", "copy-at", "majority", "parity", "recall-256", "recall-64", "selective-copy"]
    synthetic = [f"synthetic/{name}" for name in kinds]
    assert recipe_names() == sorted(language + arena + translation + synthetic)
    for name in recipe_names():
        recipe, task = load_recipe(name)
        kind = name.split("/")[0].replace("simulmt", "simulst")
        assert (recipe.name, recipe.task, task.name) == (name, kind, kind)
        assert recipe.description


@pytest.mark.parametrize("attention", ["leap", "cosformer", "linear", "softmax"])
@pytest.mark.parametrize("variant", ["paper", "gated"])
def test_attention_and_variant_are_overrides_of_every_recipe(attention, variant):
    for name in recipe_names():
        if name.startswith("simul"):  # three places of attention, each on its own
            continue
        recipe, _ = load_recipe(name, [f"attention={attention}", f"variant={variant}"])
        assert recipe.model["attention"] == attention and recipe.model["variant"] == variant


def test_a_recipe_on_the_base_of_another(tmp_path):
    first = tmp_path / "first.yaml"
    first.write_text(
        "name: a\ndescription: d\ntask: lm\ndata: {source: pydocs, block_size: 8}\nmodel: {hidden_size: 8}\n"
    )
    second = tmp_path / "second.yaml"
    second.write_text(f"base: {first}\ndata: {{block_size: 16}}\ntask: lra\n")
    third = tmp_path / "third.yaml"
    third.write_text(f"name: c\nbase: {second}\nmodel: {{num_hidden_layers: 1}}\n")
    assert read_recipe(third) == {
        "name": "c",
        "task": "lra",
        "data": {"source": "pydocs", "block_size": 16},
        "model": {"hidden_size": 8, "num_hidden_layers": 1},
    }
    first.write_text(f"base: {third}\n")
    with pytest.raises(
        LeapformerError, match=r"recipe .*third.yaml: base: expected another recipe, found .*third.yaml"
    ):
        read_recipe(third)


@pytest.mark.parametrize("place", ["encoder_attention", "decoder_attention", "cross_attention"])
@pytest.mark.parametrize("attention", ["leap", "linear", "softmax"])
def test_each_place_is_an_override_of_every_recipe_of_translation(place, attention):
    for name in recipe_names():
        if name.startswith("simul"):
            recipe, task = load_recipe(name, [f"{place}={attention}"])
            assert recipe.model[place] == attention
            before = task.pretraining(recipe)
            if before is not None:
                assert before[0].model["encoder_attention"] == recipe.model["encoder_attention"]
                assert before[0].data.target == "transcription" and before[0].data.path == recipe.data.path


def test_the_sizes_of_the_paper_on_speech():
    """arXiv 2405.13046, appendix: 12 + 6 layers of width 256, 8 heads, 2048, k of pre-decision ratio 9."""
    for name in ("simulst/mustc-en-de", "simulst/covost-fr-en"):
        recipe, task = load_recipe(name)
        before, _ = task.pretraining(recipe)
        config = build_config(recipe.model, config_class=LeapformerTranslationConfig)
        sizes = (config.encoder_layers, config.decoder_layers, config.hidden_size, config.intermediate_size)
        assert sizes == (12, 6, 256, 2048)
        assert (config.num_attention_heads, config.head_dim, config.leap_hidden, config.pre_decision) == (8, 32, 8, 9)
        assert (before.training.learning_rate, before.training.warmup_steps) == (2.5e-4, 8000)
        assert (recipe.training.learning_rate, recipe.training.warmup_steps) == (3.3e-4, 6000)
        assert recipe.training.clip == 10.0 and recipe.vocabulary.size == 10_000


def test_the_paper_recipe_has_the_paper_size_and_schedule():
    recipe, _ = load_recipe("lm/wikitext103")
    training = recipe.training
    assert (training.max_steps, training.warmup_steps, training.learning_rate, training.clip) == (250_000, 8000, 1, 0.1)
    predictions = training.batch_size * training.accumulation * (recipe.data.block_size - 1)
    assert predictions == 2 * 4096 and recipe.data.context_window == 511
    assert recipe.model["hidden_size"] == 1024 and recipe.model["num_hidden_layers"] == 16


def test_overrides_are_short_or_dotted_and_typed(tmp_path):
    recipe, _ = tiny_recipe(
        tmp_path,
        "seed=3",
        "training.learning_rate=3e-3",
        "attention=[softmax]",
        "decay=true",
        "betas=[0.8, 0.9]",
        "vocab_size=null",
    )
    assert recipe.training.seed == 3
    assert recipe.training.learning_rate == 0.003
    assert recipe.model["attention"] == ["softmax"] and recipe.model["decay"] is True
    assert recipe.training.betas == (0.8, 0.9)


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("-2", -2), ("3e-3", 0.003), (".5", 0.5), ("true", True), ("null", None), ("a/b", "a/b")],
)
def test_values(text, value):
    assert parse_value(text) == value and type(parse_value(text)) is type(value)


def test_all_faults_are_told_at_once(tmp_path):
    with pytest.raises(RecipeError) as caught:
        tiny_recipe(
            tmp_path, "atention=leap", "max_step=3", "hidden_size=abc", "learning_rate=-1", "variant=pape", "seed"
        )
    assert caught.value.faults == [
        "atention: unknown key; did you mean model.attention or model.attention_eps or model.attention_impl?",
        "max_step: unknown key; did you mean training.max_steps or training.warmup_steps?",
        "override 'seed': expected key=value",
        "model.hidden_size: expected a valid integer, unable to parse string as an integer, found 'abc'",
        "model.variant: expected one of paper, gated, found 'pape'",
        "training.learning_rate: expected greater than 0, found -1",
    ]
    assert str(caught.value).startswith("recipe tiny: 6 faults\n  atention: unknown key")


def test_names_that_are_no_choices_are_told_at_once(tmp_path):
    with pytest.raises(RecipeError) as caught:
        tiny_recipe(tmp_path, "attention=[leap, lepa]", "reweighting=foo", "hidden_act=gleu", "leap_start=late")
    assert [fault.split(": expected")[0] for fault in caught.value.faults] == [
        "model.attention",
        "model.reweighting",
        "model.hidden_act",
        "model.leap_start",
    ]
    assert "model.reweighting: expected one of cosine, quadratic, found 'foo'" in caught.value.faults


def test_unknown_keys_inside_a_file_have_the_nearest_names(tmp_path):
    content = tiny_content(tmp_path)
    content["model"]["hiden_size"] = 3
    content["trainning"] = {}
    content["data"]["blocksize"] = 3
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    faults = "\n".join(caught.value.faults)
    assert "model.hiden_size: unknown key; did you mean hidden_size" in faults
    assert "trainning: unknown key; did you mean" in faults
    assert "data.blocksize: unknown key; did you mean data.block_size" in faults


def test_cosformer_refuses_blocks_longer_than_its_maximum(tmp_path):
    with pytest.raises(
        RecipeError, match="data.block_size: expected at most model.max_position_embeddings=16, found 32"
    ):
        tiny_recipe(tmp_path, "attention=cosformer", "block_size=32")
    tiny_recipe(tmp_path, "attention=leap", "block_size=32")


def test_unknown_recipe_file_and_task(tmp_path):
    with pytest.raises(LeapformerError, match="unknown recipe 'lm/pydoc-tiny'; did you mean lm/pydocs-tiny"):
        read_recipe("lm/pydoc-tiny")
    with pytest.raises(LeapformerError, match="unknown recipe 'zzz'; known: lm/pydocs-tiny, "):
        read_recipe("zzz")
    with pytest.raises(LeapformerError, match="nope.yaml: no such file"):
        read_recipe(tmp_path / "nope.yaml")
    with pytest.raises(LeapformerError, match="task 'speech': expected one of lm"):
        get_task("speech")


@pytest.mark.parametrize(
    ("text", "found"),
    [("- a\n", "found list"), ("a: [1\n", "expected YAML, found did not find expected"), ("", "NoneType")],
)
def test_files_that_are_no_recipes(tmp_path, text, found):
    path = tmp_path / "wrong.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(LeapformerError, match=found):
        read_recipe(path)


def test_paths_may_hold_variables(monkeypatch):
    monkeypatch.setenv("LEAPFORMER_DATA", "/somewhere")
    assert str(expand_path("$LEAPFORMER_DATA/wikitext2", key="data.path")) == "/somewhere/wikitext2"
    monkeypatch.delenv("LEAPFORMER_DATA")
    with pytest.raises(LeapformerError, match="data.path: the environment variable LEAPFORMER_DATA is not set"):
        expand_path("$LEAPFORMER_DATA/wikitext2", key="data.path")


def test_the_fingerprint_ignores_the_seed_alone(tmp_path):
    plain, seeded, longer = (tiny_recipe(tmp_path, o)[0].fingerprint for o in ("seed=0", "seed=1", "max_steps=9"))
    assert plain == seeded != longer


def test_the_resolved_recipe_reads_back_as_itself(tmp_path):
    recipe, task = tiny_recipe(tmp_path, "betas=[0.8, 0.9]")
    path = tmp_path / "resolved.yaml"
    path.write_text(yaml.safe_dump(recipe.to_dict()), encoding="utf-8")
    again, _ = load_recipe(path)
    assert again == recipe and write_recipe(tmp_path).is_file() and task.name == "lm"


# ---- values that YAML makes something else of, and hostile ones


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("/a/My Data #2", "/a/My Data #2"),
        ("010", "010"),
        ("1:30", "1:30"),
        ("yes", "yes"),
        ("2020-01-01", "2020-01-01"),
        ("a: b", "a: b"),
        ("*x", "*x"),
        ("&a", "&a"),
        ("!x", "!x"),
        ("- a", "- a"),
        ("1_000", "1_000"),
        ("", None),
        ('"3"', "3"),
        ("'a #b'", "a #b"),
        ("[a, 2]", ["a", 2]),
        ("{a: 1}", {"a": 1}),
    ],
)
def test_the_value_of_an_override_is_the_text_itself(text, value):
    assert parse_value(text) == value
    if isinstance(value, str):
        assert parse_value(as_override("data.path", value).removeprefix("data.path=")) == value


@pytest.mark.parametrize("path", ["[a]/b", "123", "null", "'x'", '"a"', "a #b", "~"])
def test_a_path_of_any_name_goes_through_an_override(tmp_path, path):
    recipe, _ = tiny_recipe(tmp_path, as_override("data.path", path))
    assert recipe.data.path == path


def test_numbers_are_read_as_people_write_them(tmp_path):
    assert tiny_recipe(tmp_path, "max_steps=010")[0].training.max_steps == 10
    path = tmp_path / "tiny.yaml"
    path.write_text(path.read_text().replace("max_steps: 8", "max_steps: 010"))
    assert load_recipe(path)[0].training.max_steps == 10
    with pytest.raises(RecipeError, match="training.max_steps: expected a valid integer, .* found '1:30'"):
        tiny_recipe(tmp_path, "max_steps=1:30")


def test_a_section_twice_is_a_fault(tmp_path):
    path = write_recipe(tmp_path)
    path.write_text(path.read_text() + "training: {max_steps: 3}\n")
    with pytest.raises(LeapformerError, match="expected YAML, found the key 'training' twice at line"):
        load_recipe(path)


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]\n" for n in range(1, 5)
)


@pytest.mark.parametrize("key", ["name", "task", "data", "model", "training", "base", "tokenizer"])
def test_a_bomb_is_not_written_out(tmp_path, key):
    path = write_recipe(tmp_path)
    content = yaml.safe_load(path.read_text())
    content.pop(key, None)
    path.write_text(BOMB + yaml.safe_dump(content) + f"{key}: *a4\n")
    with pytest.raises(LeapformerError) as caught:
        load_recipe(path)
    assert max(map(len, str(caught.value).splitlines())) < 400


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"max_steps={10**30}", "training.max_steps: expected less than or equal to 1000000000, found 1000000000"),
        (f"seed={10**30}", "training.seed: expected less than or equal to 4294967295"),
        ("max_steps=true", "training.max_steps: expected a value that is no truth value, found True"),
        ("hidden_size=true", "model.hidden_size: expected a value that is no truth value, found True"),
        ("learning_rate=.inf", "training.learning_rate: expected a finite number, found inf"),
        ("hidden_dropout=.nan", "model.hidden_dropout: expected a finite number, found nan"),
        ("learning_rate=1e300", "training.learning_rate: expected less than or equal to"),
        ("betas=[1, 2]", "training.betas: expected less than 1, found 1"),
        (f"block_size={10**18}", "data.block_size: expected less than or equal to"),
        ("data.path=a\0b", "expected text, found 'a\\\\x00b'"),
        ("data.path=a\udcffb", "expected text, found 'a\\\\udcffb'"),
        ("data.path='x", "data.path: value: expected YAML, found"),
        ("x" * 10_000 + "=1", "unknown key"),
        ("name=", "name: expected a valid string, found None"),
    ],
)
def test_values_beyond_any_use_are_one_line(tmp_path, override, message):
    with pytest.raises(RecipeError, match=message) as caught:
        tiny_recipe(tmp_path, override)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_bases_that_are_none(tmp_path):
    path = write_recipe(tmp_path)
    text = path.read_text()
    for base in ("[x]", "3", "{a: 1}", str(tmp_path)):
        path.write_text(text + f"base: {base}\n")
        with pytest.raises(LeapformerError, match=r"base: expected another recipe|unknown recipe"):
            load_recipe(path)


def test_a_recipe_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    for name, found in (("pipe", "found a pipe"), ("folder", "found a folder"), ("none", "no such file")):
        with pytest.raises(LeapformerError, match=found):
            read_recipe(tmp_path / f"{name}.yaml")
    with pytest.raises(LeapformerError, match="no such file"):
        read_recipe("x" * 5000 + ".yaml")


def test_what_the_data_does_not_allow_is_told_before_a_folder_is_made(tmp_path):
    recipe, task = tiny_recipe(tmp_path, "adaptive_cutoffs=[1000]")
    with pytest.raises(LeapformerError, match="recipe tiny: model.adaptive_cutoffs: expected rising limits"):
        train(recipe, task, tmp_path / "run")
    assert not (tmp_path / "run").exists()
