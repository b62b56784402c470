"""The trainer with each method: killed and continued, in two processes, and how often the encoder sees an image."""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from advcl_hub.hub.export import verify_folder
from advcl_hub.pretraining import METHODS, Method, create_method
from advcl_hub.training.runlog import read_log
from advcl_hub.training.stop import StopRequest
from tests.support import warm
from tests.support.held import HELD, program
from tests.support.pool import run_ranks
from tests.support.reference_steps import named
from tests.support.small_encoders import SMALL_VIT, export_teacher
from train.checkpoint import load_checkpoint
from train.pretrain import Trainer
from train.recipe import Recipe, load_recipe

TINY = [
    *("data.source=fake:60", "data.size=16", "batch_size=16", "epochs=2", "optimizer.warmup_epochs=0", "attack.steps=2"),
    *("pseudo_labels.ks=[2,3]", "judge.every=0", "model_kwargs.channels=[16,16,16]", "checkpoint_minutes=0"),
]
PAPER = {"advcl": 35, "simclr": 6, "acl": 32, "deacl": 17, "profeat": 17, "pseudo_label_at": 7}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_teacher(tmp_path_factory.mktemp("teacher") / "export")


def settings(method: str, teacher: Path, folder: Path) -> list[str]:
    start = [f"start_from={teacher}"] if METHODS[method].Objective.needs_start else []
    return [*TINY, f"method={method}", f"pseudo_labels.cache={folder / 'labels'}", *start]


def recipe(method: str, teacher: Path, folder: Path, *more: str) -> Recipe:
    return load_recipe("digits_demo", [*settings(method, teacher, folder), *more])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_ends_with_the_same_weights(method: str, teacher: Path, tmp_path: Path) -> None:
    """And its export is a timm model with the weights of the branch that is finetuned."""
    whole = Trainer(recipe(method, teacher, tmp_path), tmp_path / "whole")
    assert whole.run(StopRequest())
    command = ("digits_demo", *settings(method, teacher, tmp_path), "--output", tmp_path / "run")
    with warm.start(*program("train.pretrain", "at_step(3)"), *command) as process:
        process.wait_for(HELD)
        process.kill()
    assert load_checkpoint(tmp_path / "run").step == 3
    assert Trainer(recipe(method, teacher, tmp_path), tmp_path / "run").run(StopRequest())
    ours, expected = (load_checkpoint(tmp_path / name) for name in ("run", "whole"))
    assert ours.step == expected.step == 6 and ours.tensors.keys() == expected.tensors.keys()
    assert [key for key in expected.tensors if not torch.equal(ours.tensors[key], expected.tensors[key])] == []
    verify_folder(tmp_path / "run" / "export")
    exported = timm.create_model(f"local-dir:{tmp_path / 'run' / 'export'}", pretrained=True)
    averaged = expected.encoder_state()
    assert all(torch.equal(value, averaged[key]) for key, value in exported.state_dict().items())
    losses = METHODS[method].Losses._fields
    assert all(name in record for record in read_log(tmp_path / "run") for name in losses)
    assert (tmp_path / "run" / "views.png").is_file() and (tmp_path / "run" / "curves.png").is_file()


@contextlib.contextmanager
def counted_passes(network: Method) -> Iterator[Counter[str]]:
    """Images that pass forward through the networks, and, as `backward`, those of which a gradient comes back."""
    counts: Counter[str] = Counter()

    def look(module: nn.Module, args: tuple[Tensor], made: Tensor) -> None:
        counts["forward"] += len(args[0])
        if made.requires_grad:
            made.register_hook(lambda gradient: counts.update(backward=len(gradient)))

    running = [
        getattr(module, "network", module) for module in network.networks if module is not getattr(network, "projector", 0)
    ]
    handles = [module.register_forward_hook(look) for module in running]
    yield counts
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("method", METHODS)
def test_the_cost_of_a_step_in_forward_equivalents_is_that_of_the_table(method: str, teacher: Path, tmp_path: Path) -> None:
    """A backward pass costs two forwards with the gradients of parameters, and one in the attack, where there are none."""
    steps = {"pseudo_label_at": 2}.get(method, 5)
    trainer = Trainer(recipe(method, teacher, tmp_path, f"attack.steps={steps}"), tmp_path / "run")
    trainer.begin()
    batch = next(trainer.remaining_batches())
    with counted_passes(trainer.core) as counts:
        trainer.train_step(*batch)
    attacked = {"advcl": 2, "acl": 2, "simclr": 0}.get(method, 1) * steps  # images attacked in a step, times attack steps
    in_batches = {key: value / 16 for key, value in counts.items()}
    learnt = in_batches["backward"] - attacked
    equivalents = in_batches["forward"] + attacked + 2 * learnt
    assert equivalents == PAPER[method]


def step_of(rank: int, world: int, method: str) -> dict[str, Tensor]:
    """A step of a network with layer norm only, in float64, on this rank's share of six images."""
    torch.manual_seed(0)
    pixels = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0, pretrained_cfg_overlay=pixels, **SMALL_VIT)
    head = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    network = create_method(method, encoder, ks=(3,), projector=head).double()
    if isinstance(projector := getattr(network, "projector", None), nn.Sequential):
        projector[1] = nn.Identity()
    with torch.no_grad():
        for parameter in network.encoder.parameters():  # a student that has left its teacher
            parameter.add_(0.02 * torch.randn_like(parameter))
    torch.manual_seed(1)
    views = network.augment(torch.randint(256, (6, 3, 16, 16), dtype=torch.uint8))
    labels = torch.arange(6)[:, None] % 3
    noise = (2 * torch.rand(2, 6, 3, 16, 16, dtype=torch.float64) - 1) * 8 / 255
    share = slice(rank * 6 // world, (rank + 1) * 6 // world)

    def mine(images: Tensor) -> Tensor:
        return images[..., share, :, :, :].double()

    def start(images: Tensor, eps: float) -> Tensor:
        return images + (noise[:, share][: len(images)] if images.ndim == 5 else noise[0, share])

    if isinstance(views, Tensor):
        views = mine(views)
    else:
        views = type(views)(*map(mine, views)) if hasattr(views, "_fields") else tuple(map(mine, views))

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self) -> Any:
            return self.network.losses(views, labels[share])

    step = DistributedDataParallel(Step(), broadcast_buffers=False) if world > 1 else Step()
    with patch.object(sys.modules[type(network).__module__], "uniform_start", start, create=True):
        losses = step()
    losses.total.backward()
    gradient = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    return {"losses": torch.stack([x.detach() for x in losses]), "gradient": gradient}


def steps_of(rank: int, world: int) -> dict[str, dict[str, Tensor]]:
    return {method: step_of(rank, world, method) for method in METHODS}


def test_two_processes_take_the_step_of_one() -> None:
    """Losses are means over the ranks; after DistributedDataParallel each rank has the whole gradient."""
    whole = steps_of(0, 1)
    ranks = run_ranks(steps_of, 2)
    for method, expected in whole.items():
        mean = (ranks[0][method]["losses"] + ranks[1][method]["losses"]) / 2
        torch.testing.assert_close(mean, expected["losses"], rtol=1e-9, atol=1e-12, msg=named(method))
        assert expected["gradient"].norm() > 1e-3
        for rank in ranks:
            torch.testing.assert_close(rank[method]["gradient"], expected["gradient"], rtol=1e-6, atol=1e-10, msg=named(method))
