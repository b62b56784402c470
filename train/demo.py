"""What AdvCL is for, shown on 1,797 digits in a few minutes on a CPU: python -m train.demo --output runs/demo

Pretrains an AdvCL and a plain SimCLR encoder at equal compute, fits a linear head on the frozen features of each, attacks both
with PGD-20, and compares. Everything it prints can be made again from the recipes digits_demo and digits_demo_simclr.
"""

import argparse
import json
import logging
from pathlib import Path

import timm
import torch
from torch import nn

from advcl_hub.attacks import pgd
from advcl_hub.cli.common import script
from advcl_hub.data import ImageData, load_data
from advcl_hub.evaluation import Protocol, Robustness, robustness
from advcl_hub.evaluation.measure import loss_of
from advcl_hub.evaluation.pictures import save_adversarial_examples
from advcl_hub.hub.export import export_folder, load_folder, verify_folder
from advcl_hub.models.pixel_space import PixelSpace
from advcl_hub.training.stop import StopRequest
from train.pretrain import pretrain
from train.probe import linear_probe
from train.recipe import Recipe, load_recipe

RECIPES = {"SimCLR": "digits_demo_simclr", "AdvCL": "digits_demo"}
log = logging.getLogger("advcl")


def run_demo(output: Path, overrides: list[str], stop: StopRequest) -> dict[str, Robustness] | None:
    """Trains, compares and exports. Returns accuracies on the test images by method, or None if it was stopped on the way."""
    recipes = {method: load_recipe(name, overrides) for method, name in RECIPES.items()}
    for method, recipe in recipes.items():
        log.info("\n== %s: pretraining without labels, recipe %s", method, RECIPES[method])
        if not pretrain(recipe, output / method.lower(), stop):
            return None

    log.info("\n== A linear head on each frozen encoder, then PGD-20 on the test images")
    recipe = recipes["AdvCL"]
    train, test = (load_data(recipe.data.source, s, root=recipe.data.root, size=recipe.data.size) for s in ("train", "test"))
    eps = recipe.attack.eps
    models: dict[str, nn.Module] = {}
    results: dict[str, Robustness] = {}
    for method in recipes:
        models[method] = linear_probe(load_folder(output / method.lower() / "export"), train, "cpu")
        results[method] = robustness(models[method], test, eps=eps, step_size=eps / 4, steps=20)
    log.info("\n%s", table(results))

    shown = test.subset(torch.arange(10))
    assert isinstance(shown.images, torch.Tensor)
    picture = save_adversarial_examples(
        output / "adversarial_examples.png",
        {method: _attacked(model, shown, eps) for method, model in models.items()},
        shown.images / 255,
        shown.labels,
        shown.classes,
        Protocol(eps=eps),
    )
    folder = export_classifier(output / "classifier", models["AdvCL"], results["AdvCL"], recipe, test)
    log.info(
        "\nPictures:  %s\n           %s/{advcl,simclr}/{views,curves}.png\n"
        "Use it:    import advcl_hub, timm\n"
        '           model = timm.create_model("local-dir:%s", pretrained=True)',
        picture,
        output,
        folder,
    )
    return results


def _attacked(model: nn.Module, data: ImageData, eps: float) -> tuple[nn.Module, torch.Tensor]:
    assert isinstance(data.images, torch.Tensor)
    classifier = PixelSpace(model).eval()
    loss = loss_of(classifier, data.labels, "ce")
    return classifier, pgd(loss, data.images / 255, eps=eps, step_size=eps / 4, steps=20)


def table(results: dict[str, Robustness]) -> str:
    """The comparison as text."""
    any_result = next(iter(results.values()))
    lines = [f"{'linear head on':16}{'standard':>10}{'robust':>10}"]
    lines += [f"{method:16}{r.standard:>10.1%}{r.robust:>10.1%}" for method, r in results.items()]
    return "\n".join(lines) + (
        f"\n({any_result.images} test digits; robust: PGD-{any_result.steps}, l_inf, eps {any_result.eps * 255:g}/255, "
        f"step {any_result.step_size * 255:g}/255, seed {any_result.seed})"
    )


def export_classifier(folder: Path, model: nn.Module, result: Robustness, recipe: Recipe, test: ImageData) -> Path:
    """Exports the classifier and reloads it through timm: the outputs must be equal."""
    encoder = json.loads((folder.parent / "advcl" / "export" / "results.json").read_text(encoding="utf-8"))
    results = {
        **encoder,
        "kind": "classifier",
        "protocol": "linear head, fixed features",
        "figures": {"test": vars(result)},
    }
    export_folder(model, folder, results=results, model_args=recipe.model_kwargs, label_names=test.classes)
    verify_folder(folder)
    reloaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert isinstance(test.images, torch.Tensor)
    images = test.images[:50] / 255
    with torch.no_grad():
        if not torch.equal(reloaded(images), model(images)):
            raise ValueError(f"The classifier in {folder} computes something else after reloading.")
    log.info("Exported the AdvCL classifier; reloaded through timm, its outputs are equal.")
    return folder


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m train.demo", description=__doc__.split("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings changed in both recipes")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    args = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("timm").setLevel(logging.WARNING)
    with script("Interrupted. Nothing is lost: run the same command again to continue."):
        results = run_demo(args.output, args.overrides, StopRequest())
        if results is None:
            print("Stopped with a checkpoint. Run the same command again to continue.")


if __name__ == "__main__":
    main()
