"""Recipes: what is read, what is overridden, and what is refused before anything starts."""

from pathlib import Path

import pytest

from train.inputs import check_same_recipe
from train.recipe import RECIPES, Recipe, from_dict, load_recipe

LABELS = "pseudo_labels.path=labels.safetensors"


@pytest.mark.parametrize("name", sorted(p.stem for p in RECIPES.glob("*.yaml")))
def test_every_recipe_in_the_project_is_valid_and_says_what_it_is(name: str) -> None:
    recipe = load_recipe(name, [LABELS, "pseudo_labels.encoder=null"])
    assert from_dict(recipe.to_dict()) == recipe
    header = (RECIPES / f"{name}.yaml").read_text().split("model:")[0]
    assert f"train.pretrain {name}" in header


def test_the_published_values() -> None:
    recipe = load_recipe("cifar10_resnet18", [LABELS])
    assert (recipe.epochs, recipe.batch_size, recipe.model) == (1000, 512, "resnet18_cifar")
    assert (recipe.attack.eps, recipe.attack.step_size, recipe.attack.steps) == (8 / 255, 2 / 255, 5)
    assert recipe.pseudo_labels.ks == (2, 10, 50, 100, 500)
    assert recipe.objective.clean_views == ("strong1", "strong2", "high_frequency")
    assert recipe.objective.branches == ("clean", "adv", "adv_ce")
    assert (recipe.objective.temperature, recipe.objective.base_temperature, recipe.objective.pseudo_label_weight) == (
        0.5,
        0.07,
        0.2,
    )
    o = recipe.optimizer
    assert (o.name, o.lr, o.momentum, o.weight_decay, o.warmup_epochs, o.min_lr_ratio) == ("sgd", 0.5, 0.9, 1e-4, 10, 1e-3)
    assert (recipe.views.crop_scale, recipe.views.hfc_radius) == ((0.2, 1.0), 8)


def test_overrides_convert_to_the_type_of_the_setting() -> None:
    recipe = load_recipe(
        "digits_demo",
        [
            "attack.eps=4/255",
            "optimizer.lr=1e-3",
            "speed.mixed_precision=no",
            "model_kwargs.drop_path_rate=0.1",
            "data.size=null",
        ],
    )
    assert recipe.attack.eps == 4 / 255
    assert recipe.optimizer.lr == 1e-3
    assert recipe.speed.mixed_precision == "no"
    assert recipe.model_kwargs == {"drop_path_rate": 0.1}
    assert recipe.data.size is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("atack.eps=1", "Unknown key 'atack'. Did you mean 'attack'"),
        ("attack.epss=1", "Unknown key 'attack.epss'. Did you mean 'attack.eps'"),
        ("epochs=ten", "epochs must be int, got 'ten'"),
        ("epochs=1.5", "epochs must be int"),
        ("attack.eps=8/0", "attack.eps must be float"),
        ("attack=3", "attack is a group of settings"),
        ("epochs", "An override is key=value"),
        ("epochs=1", "warmup_epochs"),
        ("speed.mixed_precision=fp16", "speed: mixed_precision must be no or bf16"),
        ("optimizer.name=lion", "optimizer: name must be sgd or adamw"),
        ("data.val_fraction=0", "judge.every needs held-out images"),
        ("pseudo_labels.encoder=null", "needs labels: set pseudo_labels.path or pseudo_labels.encoder"),
        ("pseudo_labels.path=a", "give either path or encoder"),
        ("objective.clean_views=[strong3]", "no view 'strong3'; the views are strong1"),
        ("objective.clean_views=[]", "at least two views"),
        ("objective.pairing=both", "pairing must be joint or separate"),
        ("ema_decay=1", "ema_decay must be in"),
        ("seed=-1", "seed must be from 0"),
        ("attack.step_size=-1/255", "attack: eps, step_size and steps must not be negative"),
        ("objective.temperature=0", "objective: temperature, base_temperature and projection_dim must be positive"),
        ("objective.pseudo_label_weight=-0.2", "pseudo_label_weight must not be negative"),
        ("objective.clean_views=[weak, weak]", "every view once"),
        ("objective.adversarial_views=[high_frequency]", "high_frequency cannot be attacked"),
        ("optimizer.weight_decay=-1", "must not be negative"),
        ("judge.every=-1", "judge: every and steps must not be negative"),
        ("judge.val_images=0", "judge: train_images and val_images must be at least 1"),
        ("views.crop_scale=[0.2]", "views.crop_scale needs 2 values"),
    ],
)
def test_refusals(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        load_recipe("digits_demo", [override])


def test_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(FileNotFoundError, match="digits_demo"):
        load_recipe("digit_demo")


def test_a_file_that_is_not_yaml(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("a: [1,")
    with pytest.raises(ValueError, match="is not YAML"):
        load_recipe(str(tmp_path / "bad.yaml"))


def test_a_checkpoint_of_another_recipe_is_refused_but_not_of_another_watch(tmp_path: Path) -> None:
    recipe = load_recipe("digits_demo")
    check_same_recipe(recipe, load_recipe("digits_demo", ["judge.every=1", "checkpoint_minutes=9"]), tmp_path)
    with pytest.raises(ValueError, match=r"attack.steps: 5 there, 3 now"):
        check_same_recipe(recipe, load_recipe("digits_demo", ["attack.steps=3"]), tmp_path)


def test_default_recipe_is_the_paper_except_for_labels() -> None:
    with pytest.raises(ValueError, match="needs labels"):
        Recipe()
