"""Properties of recipes: YAML and `key=value` say the same, what is written is read again, and the rest is refused by name."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support.properties import LETTERS, damaged, json_values, odd_text
from train.recipe import Recipe, from_dict, load_recipe

BASE = {"pseudo_labels": {"path": "labels.safetensors"}}
words = st.text(st.sampled_from(LETTERS.replace("\ud800", "")), max_size=8)
shares, positive = st.floats(0, 0.99), st.floats(1e-9, 1e3)
fractions = st.tuples(st.integers(0, 255), st.integers(1, 255)).map("{0[0]}/{0[1]}".format) | st.floats(0, 1)
settings = st.fixed_dictionaries(
    {},
    optional={
        "epochs": st.integers(11, 2000),
        "batch_size": st.integers(2, 4096),
        "seed": st.integers(0, 2**32 - 1),
        "ema_decay": shares,
        "start_from": st.none() | words,
        "model_kwargs.init_values": positive | st.just(1e-5),
        "model_kwargs.stem": words,
        "data.root": st.none() | words,
        "data.download": st.booleans(),
        "data.val_fraction": st.floats(0.01, 0.9),
        "views.crop_scale": st.lists(st.floats(0.01, 1), min_size=2, max_size=2).map(sorted),
        "attack.eps": fractions,
        "attack.steps": st.integers(0, 20),
        "optimizer.lr": st.floats(0.01, 1e3),
        "optimizer.weight_decay": positive,
        "objective.temperature": positive,
        "pseudo_labels.ks": st.lists(st.integers(2, 500), min_size=1, max_size=3),
        "speed.compile": st.booleans(),
        "judge.every": st.integers(0, 9),
    },
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes") / "recipe.yaml"


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """Groups out of dotted keys, beside what every recipe needs."""
    found: dict[str, Any] = json.loads(json.dumps(BASE))
    for key, value in values.items():
        *groups, leaf = key.split(".")
        place = found
        for group in groups:
            place = place.setdefault(group, {})
        place[leaf] = value
    return found


def numbers(values: Any) -> Iterator[float]:
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, dict | list):
            yield from numbers(value)
        elif isinstance(value, int | float):
            yield value


@given(settings)
@example({"model_kwargs.init_values": 1e-5})
def test_yaml_and_overrides_and_plain_values_say_the_same(path: Path, values: dict[str, Any]) -> None:
    recipe = from_dict(nested(values))
    path.write_text(yaml.safe_dump(nested(values)), encoding="utf-8")
    assert load_recipe(str(path)) == recipe
    path.write_text(json.dumps(BASE), encoding="utf-8")
    assert load_recipe(str(path), [f"{key}={json.dumps(value)}" for key, value in values.items()]) == recipe


@given(settings)
@example({"model_kwargs.init_values": 1e-5})
@example({"optimizer.weight_decay": 1e-9})
def test_a_recipe_that_was_written_is_read_again(path: Path, values: dict[str, Any]) -> None:
    recipe = from_dict(nested(values))
    assert from_dict(recipe.to_dict()) == recipe == from_dict(json.loads(json.dumps(recipe.to_dict())))
    for text in (json.dumps(recipe.to_dict(), indent=2), yaml.safe_dump(recipe.to_dict())):
        path.write_text(text, encoding="utf-8")
        assert load_recipe(str(path)) == recipe


@given(damaged(from_dict(BASE).to_dict()))
@example({**BASE, "optimizer": {"weight_decay": math.nan}})
@example({**BASE, "attack": {"eps": math.nan}})
@example({**BASE, "attack": {"eps": math.inf}})
@example({**BASE, "attack": {"eps": "1e999999999"}})
@example({**BASE, "attack": {"eps": "1" * 400 + "/1"}})
@example({**BASE, "attack": {"eps": "1/0"}})
@example({**BASE, "checkpoint_minutes": math.inf})
@example({**BASE, "objective": {"temperature": math.nan}})
def test_other_values_are_a_recipe_or_refused(values: Any) -> None:
    if not isinstance(values, dict):
        return
    try:
        recipe = from_dict(values)
    except ValueError:
        return
    plain = recipe.to_dict()
    del plain["model_kwargs"]  # of the architecture, not ours
    assert isinstance(recipe, Recipe) and all(map(math.isfinite, numbers(plain)))
    assert from_dict(recipe.to_dict()) == recipe or values.get("model_kwargs")


yaml_text = st.lists(
    st.sampled_from(
        [*"{}[]:,&*!|>-?#% \n\t'\"", "!!bool", "!!int", "!!timestamp", "0x_", "2001-99-99", "epochs", "attack", "a", "1"]
    ),
    max_size=8,
).map("".join)


@given(yaml_text | odd_text | json_values.map(json.dumps))
@example("epochs: !!bool maybe")
@example('epochs: !!int ""')
@example("epochs: 0x_")
@example("epochs: 2001-99-99")
@example("epochs: !!timestamp x")
@example("model_kwargs: {day: 2001-01-01}")
@example("model_kwargs: &a {x: *a}")
@example("[" * 400 + "]" * 400)
@example("[" * 60 + "]" * 60)
@example("\x00")
@example("- 1")
@example("5")
def test_any_text_is_a_recipe_or_a_refusal_that_names_the_file(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    for overrides in ((), [f"model_kwargs.x={text}"]):
        try:
            recipe = load_recipe(str(path), ["pseudo_labels.path=x", *overrides])
        except ValueError as error:
            told = str(error)
            assert (
                str(path) in told
                or "not YAML" in told
                or told.startswith(("Unknown key", "pseudo_labels", "model_kwargs"))
                or "must" in told
            )
        else:
            assert json.loads(json.dumps(recipe.to_dict()))


@given(st.sampled_from(["", "data", "views", "attack", "objective", "pseudo_labels", "optimizer", "speed", "judge"]), st.data())
def test_an_unknown_key_is_refused_with_the_nearest_known_one(group: str, data: st.DataObject) -> None:
    plain = from_dict(BASE).to_dict()
    known = sorted(plain[group] if group else plain)
    name = data.draw(st.sampled_from([each for each in known if len(each) > 4] or known))
    wrong = name + "x"
    values = nested({f"{group}.{wrong}" if group else wrong: 1})
    full = f"{group}.{name}" if group else name
    with pytest.raises(ValueError, match="Unknown key") as refusal:
        from_dict(values)
    assert f"Did you mean {full!r}?" in str(refusal.value) and all(each in str(refusal.value) for each in known)


@given(odd_text, odd_text)
def test_an_override_without_key_or_equals_is_refused(key: str, value: str) -> None:
    wrong = key.replace("=", "")
    for override in (wrong, f"={value}"):
        with pytest.raises(ValueError, match="An override is key=value"):
            load_recipe("digits_demo", [override])
