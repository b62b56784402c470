"""Recipes: what is read, what is overridden, and what is refused before anything starts; the published ones' facts."""

import json
import math
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from advcl_hub.hub.export import export_folder, verify_folder
from advcl_hub.models.branch_norm import branch_state_dict
from train.inputs import check_same_recipe
from train.network import build_encoder, build_network, build_optimizer, build_schedule, plain_encoder
from train.recipe import RECIPES, Recipe, from_dict, load_recipe

LABELS = "pseudo_labels.path=labels.safetensors"
SHAPE = (3, 32, 32)


@pytest.mark.parametrize("name", sorted(p.stem for p in RECIPES.glob("*.yaml")))
def test_every_recipe_in_the_project_is_valid_and_says_what_it_is(name: str) -> None:
    recipe = load_recipe(name, [LABELS, "pseudo_labels.encoder=null", "start_from=teacher"])
    assert from_dict(recipe.to_dict()) == recipe
    header = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").split("model:")[0]
    assert f"train.pretrain {name}" in header


def test_the_published_values() -> None:
    recipe = load_recipe("cifar10_resnet18", [LABELS])
    assert (recipe.epochs, recipe.batch_size, recipe.model) == (1000, 512, "resnet18_cifar")
    assert (recipe.attack.eps, recipe.attack.step_size, recipe.attack.steps) == (8 / 255, 2 / 255, 5)
    assert recipe.pseudo_labels.ks == (2, 10, 50, 100, 500)
    assert recipe.objective.branches == ("clean", "adv", "adv_ce")
    assert (recipe.objective.temperature, recipe.objective.base_temperature, recipe.objective.pseudo_label_weight) == (
        0.5,
        0.07,
        0.2,
    )
    o = recipe.optimizer
    assert (o.name, o.lr, o.momentum, o.weight_decay, o.warmup_epochs, o.min_lr_ratio) == ("sgd", 0.5, 0.9, 1e-4, 10, 1e-3)
    assert (recipe.views.crop_scale, recipe.views.hfc_radius) == ((0.2, 1.0), 8)


def test_the_published_learning_rate_step_by_step() -> None:
    """The authors' code sets the rate of an epoch to the cosine at its end, and warms up to that of epoch 10, 0.49988."""
    recipe, steps = load_recipe("cifar10_resnet18", [LABELS]), 49_000 // 512
    assert steps == 95
    optimizer = build_optimizer(recipe, nn.Linear(2, 2))
    schedule = build_schedule(recipe, optimizer, steps)

    def ours(epoch: int, step: int) -> float:
        schedule.step_update(epoch * steps + step)
        return float(optimizer.param_groups[0]["lr"])

    def published(epoch: int) -> float:
        return 5e-4 + (0.5 - 5e-4) * (1 + math.cos(math.pi * (epoch + 1) / 1000)) / 2

    for epoch in range(10):
        for step in (0, 40, 94):
            part = (epoch * steps + step) / (10 * steps)
            assert ours(epoch, step) == pytest.approx(0.01 + part * (published(9) - 0.01), abs=2e-4)
    for epoch in range(10, 1000):
        assert 0 < ours(epoch, 0) - published(epoch) < 8e-4
        assert ours(epoch, steps - 1) == pytest.approx(published(epoch), abs=1e-5)


def test_the_initial_network_is_the_published_one() -> None:
    """What the authors' network starts with (their models/resnet_cifar_multibn_ensembleFC.py): convolutions He-normal by
    fan-out, batch norms 1 and 0, and torch's own start of linear layers, weights and biases uniform within 1/sqrt(inputs)."""
    network = build_network(load_recipe("cifar10_resnet18", [LABELS]), SHAPE)
    layers = dict(network.named_modules())
    norms = {name: m for name, m in layers.items() if isinstance(m, _BatchNorm)}
    convolutions = {name: m for name, m in layers.items() if isinstance(m, nn.Conv2d)}
    linear = {name: m for name, m in layers.items() if isinstance(m, nn.Linear)}
    assert len(norms) == 20 * 3 + 1 and len(convolutions) == 20
    assert list(linear) == ["projector.0", "projector.3", *(f"heads.{k}" for k in (2, 10, 50, 100, 500))]
    for name, norm in norms.items():
        state = [norm.weight, norm.bias, norm.running_mean, norm.running_var]
        assert [t.unique().tolist() for t in state] == [[1], [0], [0], [1]], name
        assert norm.num_batches_tracked.item() == 0 and (norm.eps, norm.momentum) == (1e-5, 0.1), name
    for name, conv in convolutions.items():
        assert conv.bias is None
        z = conv.weight / math.sqrt(2 / (conv.out_channels * conv.kernel_size[0] ** 2))
        error = z.numel() ** -0.5  # of a mean of z
        assert z.mean().abs() < 5 * error, name
        assert (z.square().mean() - 1).abs() < 5 * error * math.sqrt(2), name
        assert (z.pow(4).mean() - 3).abs() < 5 * error * math.sqrt(96), name  # normal: a uniform distribution has 1.8
    for name, layer in linear.items():
        for tensor in (layer.weight, layer.bias):
            z = tensor * math.sqrt(layer.in_features)
            error = z.numel() ** -0.5
            assert z.abs().max() <= 1, name
            assert z.mean().abs() < 5 * error * math.sqrt(1 / 3), name
            assert (z.square().mean() - 1 / 3).abs() < 5 * error * math.sqrt(4 / 45), name
            assert (z.pow(4).mean() - 1 / 5).abs() < 5 * error * math.sqrt(16 / 225), name


@pytest.mark.parametrize("name", sorted(p.stem for p in RECIPES.glob("cifar10_resnet18*.yaml")))
def test_no_residual_block_of_the_published_networks_starts_at_zero(name: str) -> None:
    """timm's ResNets do unless told; the networks of AdvCL and ACL have weight 1 in the last batch norm of a block."""
    recipe = load_recipe(name, [LABELS, "model_kwargs.channels=[8, 8, 8, 8]", "start_from=teacher"])
    norms = [m for m in build_encoder(recipe, SHAPE).modules() if isinstance(m, _BatchNorm)]
    assert len(norms) == 20
    assert all((m.weight == 1).all() for m in norms)


def test_the_export_of_a_published_recipe_opens_through_timm(tmp_path: Path) -> None:
    recipe = load_recipe("cifar10_resnet18", [LABELS, "model_kwargs.channels=[8, 8, 8, 8]"])
    network = build_network(recipe, SHAPE)
    images = torch.rand(4, *SHAPE)
    with torch.no_grad():
        network.features(images, "adv")  # averages of its own
    encoder = plain_encoder(recipe, SHAPE, branch_state_dict(network.encoder.state_dict(), "adv"), {})
    folder = export_folder(encoder, tmp_path / "export", results={}, model_args=recipe.model_kwargs)
    verify_folder(folder)
    arguments = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_args"]
    assert (arguments["zero_init_last"], arguments["channels"]) == (False, [8, 8, 8, 8])
    name = f"local-dir:{folder}"
    with torch.no_grad():
        expected = encoder(images)
        assert torch.equal(timm.create_model(name, pretrained=True).eval()(images), expected)
        assert torch.equal(timm.create_model(name, pretrained=True, num_classes=0).eval()(images), expected)
        for classes in (1, 7):
            classifier = timm.create_model(name, pretrained=True, num_classes=classes).eval()
            assert classifier(images).shape == (4, classes)
            features = classifier.forward_head(classifier.forward_features(images), pre_logits=True)
            assert torch.equal(features, expected)
        pyramid = timm.create_model(name, pretrained=True, features_only=True).eval()
        levels = pyramid(images)
        assert pyramid.feature_info.reduction() == [1, 1, 2, 4, 8]
        assert [tuple(level.shape) for level in levels] == [(4, 8, 32 // r, 32 // r) for r in (1, 1, 2, 4, 8)]
        torch.testing.assert_close(levels[-1].mean((2, 3)), expected)
        deepest = timm.create_model(name, pretrained=True, features_only=True, out_indices=(4,)).eval()
        assert torch.equal(deepest(images)[0], levels[-1])
    fresh = timm.create_model(name, pretrained=False, num_classes=3)
    assert all((m.weight == 1).all() for m in fresh.modules() if isinstance(m, _BatchNorm))


def test_overrides_convert_to_the_type_of_the_setting() -> None:
    recipe = load_recipe(
        "digits_demo",
        [
            "attack.eps=4/255",
            "optimizer.lr=2e-2",
            "speed.mixed_precision=no",
            "model_kwargs.drop_path_rate=0.1",
            "data.size=null",
        ],
    )
    assert recipe.attack.eps == 4 / 255
    assert recipe.optimizer.lr == 2e-2
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
        ("optimizer.name=lion", "optimizer: name must be sgd, adamw, lars or lamb, got 'lion'"),
        ("data.val_fraction=0", "judge.every needs held-out images"),
        ("pseudo_labels.encoder=null", "advcl needs pseudo-labels: set pseudo_labels.path or pseudo_labels.encoder"),
        ("pseudo_labels.path=a", "give either path or encoder"),
        ("method=decl", "method is 'decl'. Did you mean 'deacl'"),
        ("method=[deacl]", "method is a name, got ['deacl']; known: advcl"),
        ("method=deacl", "deacl starts from a clean teacher: set start_from to a run"),
        ("objective.robust_weight=2", "method advcl: Unknown key 'objective.robust_weight'. Did you mean"),
        ("ema_decay=1", "ema_decay must be in"),
        ("seed=-1", "seed must be from 0"),
        ("attack.step_size=-1/255", "attack: eps, step_size and steps must not be negative"),
        ("objective.temperature=0", "objective: temperature, base_temperature and projection_dim must be positive"),
        ("objective.pseudo_label_weight=-0.2", "pseudo_label_weight must not be negative"),
        ("optimizer.weight_decay=-1", "must not be negative"),
        ("optimizer={name: lars, weight_decay: 0}", "lars of timm scales the step of tensors with weight decay only: set"),
        ("optimizer={name: adamw, lr: 2e-3}", "rises from warmup_lr to lr, but 0.01 is above 0.002: set warmup_lr lower"),
        ("optimizer.min_lr_ratio=2", "optimizer: the rate ends at lr .* at most lr: min_lr_ratio is 2"),
        ("optimizer.warmup_epochs=-1", "warmup_epochs .-1.0. must be less than epochs"),
        ("judge.every=-1", "judge: every and steps must not be negative"),
        ("judge.val_images=0", "judge: train_images and val_images must be at least 1"),
        ("views.crop_scale=[0.2]", "views.crop_scale needs 2 values"),
    ],
)
def test_refusals(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        load_recipe("digits_demo", [override])


def test_without_warm_up_its_rate_does_not_matter() -> None:
    assert load_recipe("digits_demo", ["optimizer={lr: 1e-3, warmup_epochs: 0}"]).optimizer.lr == 1e-3


def test_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(FileNotFoundError, match="digits_demo"):
        load_recipe("digit_demo")


def test_a_file_that_is_not_yaml(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("a: [1,", encoding="utf-8")
    with pytest.raises(ValueError, match="is not YAML"):
        load_recipe(str(tmp_path / "bad.yaml"))


def test_a_checkpoint_of_another_recipe_is_refused_but_not_of_another_watch(tmp_path: Path) -> None:
    recipe = load_recipe("digits_demo")
    check_same_recipe(recipe, load_recipe("digits_demo", ["judge.every=1", "checkpoint_minutes=9"]), tmp_path)
    with pytest.raises(ValueError, match=r"attack.steps: 5 there, 3 now"):
        check_same_recipe(recipe, load_recipe("digits_demo", ["attack.steps=3"]), tmp_path)


def test_default_recipe_is_the_paper_except_for_labels() -> None:
    with pytest.raises(ValueError, match=r"advcl needs pseudo-labels: .* or objective\.pseudo_label_weight to 0"):
        Recipe()
    with pytest.raises(ValueError, match="simclr takes a SimCLRObjective"):
        Recipe(method="simclr")
