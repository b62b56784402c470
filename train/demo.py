"""What AdvCL is for, shown in a few minutes on a CPU: python -m train.demo --output runs/demo

First, in seconds: a linear head for digits on each of two released encoders, a robust and a plain one, both attacked.
Then the same from the beginning: pretrains an AdvCL and a plain SimCLR encoder on 1,797 digits at equal compute, fits a head
on the frozen features of each, attacks both with PGD-20, and compares. This second part can be made again from the recipes
digits_demo and digits_demo_simclr.
"""

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from torch import nn

from advcl_hub.cli.common import script
from advcl_hub.data import ImageData, batches, load_data
from advcl_hub.evaluation import Protocol, Robustness, adversarial_images, robustness
from advcl_hub.evaluation.pictures import save_adversarial_examples
from advcl_hub.files import check_writable, replacing
from advcl_hub.hub.export import load_folder, verify_folder
from advcl_hub.models.pixel_space import PixelSpace
from advcl_hub.training.stop import StopRequest
from train.checkpoint import load_checkpoint
from train.export import export_checkpoint
from train.pretrain import pretrain
from train.probe import linear_probe
from train.recipe import load_recipe

RELEASED = {"plain": "resnet10_cifar.simclr_c10", "robust": "resnet10_cifar.pseudo_label_at_c10"}
RECIPES = {"SimCLR": "digits_demo_simclr", "AdvCL": "digits_demo"}
log = logging.getLogger("advcl")


def first_look(output: Path) -> None:
    """Fits a head for digits on each released encoder, attacks both classifiers, and prints and draws what that did.

    A demo that goes on after it was stopped shows what it has, and does not measure again.
    """
    picture, figures = output / "first_look.png", output / "first_look.txt"
    if picture.is_file() and figures.is_file():
        log.info("== Two released encoders, attacked before: %s\n%s", picture, figures.read_text(encoding="utf-8"))
        return
    train, test = load_data("digits", "train"), load_data("digits", "test").subset(torch.arange(100))
    log.info("== Two released encoders of one size, pretrained on photographs: a linear head for digits on each, then PGD-20")
    attack = Protocol()
    models = {title: linear_probe(timm.create_model(name, pretrained=True), train, "cpu") for title, name in RELEASED.items()}
    results = {title: _attacked(model, test, attack) for title, model in models.items()}
    text = table("linear head on", {RELEASED[title]: result for title, result in results.items()})
    log.info("%s", text)
    log.info("Picture: %s", draw(picture, models, test.subset(torch.arange(10)), attack))
    with replacing(figures) as draft:
        draft.write_text(text, encoding="utf-8")


def run_demo(output: Path, overrides: list[str], stop: StopRequest) -> dict[str, Robustness] | None:
    """Trains, compares and exports. Returns accuracies on the test images by method, or None if it was stopped on the way."""
    recipes = {method: load_recipe(name, overrides) for method, name in RECIPES.items()}  # refuses before work starts
    check_writable(output)
    first_look(output)
    for method, recipe in recipes.items():
        log.info("\n== %s: pretraining without labels, recipe %s", method, RECIPES[method])
        if not pretrain(recipe, output / method.lower(), stop):
            return None

    log.info("\n== A linear head on each frozen encoder, then PGD-20 on the test images")
    recipe = recipes["AdvCL"]
    train, test = (load_data(recipe.data.source, s, root=recipe.data.root, size=recipe.data.size) for s in ("train", "test"))
    attack = Protocol(eps=recipe.attack.eps)
    models = {method: linear_probe(load_folder(output / method.lower() / "export"), train, "cpu") for method in recipes}
    results = {method: _attacked(model, test, attack) for method, model in models.items()}
    log.info("\n%s", table("linear head on", results))

    picture = draw(output / "adversarial_examples.png", models, test.subset(torch.arange(10)), attack)
    folder = export_checkpoint(
        load_checkpoint(output / "advcl"),
        output / "classifier",
        classifier=models["AdvCL"],
        classes=test.classes,
        figures={"test": vars(results["AdvCL"])},
    )
    verify_folder(folder)
    images = next(batches(test, 50))[0] / 255
    with torch.no_grad():
        if not torch.equal(load_folder(folder)(images), models["AdvCL"](images)):
            raise ValueError(f"The classifier in {folder} computes something else after reloading.")
    log.info("Exported the AdvCL classifier; reloaded through timm, its outputs are equal.")
    log.info(
        "\nPictures:  %s\n           %s/{advcl,simclr}/{views,curves}.png\n"
        "Use it:    import advcl_hub, timm\n"
        '           model = timm.create_model("local-dir:%s", pretrained=True)',
        picture,
        output,
        folder,
    )
    return results


def _attacked(model: nn.Module, data: ImageData, attack: Protocol) -> Robustness:
    return robustness(model, data, eps=attack.radius, step_size=attack.step, steps=attack.steps)


def draw(path: Path, models: Mapping[str, nn.Module], data: ImageData, attack: Protocol) -> Path:
    """Draws some images as each model was attacked on them when it was measured."""
    attacked = {name: (PixelSpace(model).eval(), adversarial_images(model, data, attack)) for name, model in models.items()}
    assert isinstance(data.images, torch.Tensor)
    return save_adversarial_examples(path, attacked, data.images / 255, data.labels, data.classes, attack)


def table(title: str, results: dict[str, Robustness]) -> str:
    """The comparison as text."""
    any_result = next(iter(results.values()))
    width = 2 + max(map(len, [title, *results]))
    lines = [f"{title:{width}}{'standard':>10}{'robust':>10}"]
    lines += [f"{name:{width}}{r.standard:>10.1%}{r.robust:>10.1%}" for name, r in results.items()]
    return "\n".join(lines) + (
        f"\n({any_result.images} test digits; robust: PGD-{any_result.steps}, l_inf, eps {any_result.eps * 255:g}/255, "
        f"step {any_result.step_size * 255:g}/255, seed {any_result.seed})"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m train.demo", description=__doc__.split("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings changed in both recipes")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder (default: runs/demo)")
    args = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("timm").setLevel(logging.WARNING)
    with script("Interrupted. Nothing is lost: run the same command again to continue."):
        results = run_demo(args.output, args.overrides, StopRequest())
        if results is None:
            print("Stopped with a checkpoint. Run the same command again to continue.")


if __name__ == "__main__":
    main()
