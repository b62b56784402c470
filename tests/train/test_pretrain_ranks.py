"""Two real processes give the loss, the gradient and the attack of one process with the whole batch."""

import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from advcl_hub.pretraining import AdvCL, Attack
from advcl_hub.pretraining.losses import contrastive_loss
from advcl_hub.pretraining.views import ViewConfig, Views
from advcl_hub.training.runlog import read_log
from tests.support import warm
from tests.support.pool import run_ranks
from tests.support.small_encoders import export_teacher
from train.checkpoint import load_checkpoint
from train.collectives import Collectives
from train.pretrain import Trainer
from train.recipe import load_recipe

BATCH, VIEWS, DIM = 6, 3, 5


class Projector(nn.Module):
    """A network without batch statistics: its loss may depend on the other rank's images through the objective alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, DIM)).double()

    def forward(self, x: Tensor) -> Tensor:
        return contrastive_loss(nn.functional.normalize(self.layers(x), dim=-1))


def inputs() -> Tensor:
    return torch.randn(VIEWS, BATCH, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def loss_and_gradients(rank: int, world: int) -> list[Tensor]:
    share = BATCH // world
    x = inputs()[:, rank * share : (rank + 1) * share].clone().requires_grad_()
    model = Projector()
    parallel = DistributedDataParallel(model) if world > 1 else model
    loss = parallel(x)
    loss.backward()
    assert x.grad is not None
    return [loss.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def test_loss_and_gradient_equal_one_process() -> None:
    whole = loss_and_gradients(0, 1)
    ranks = run_ranks(loss_and_gradients, 2)
    assert len(ranks) == 2
    torch.testing.assert_close((ranks[0][0] + ranks[1][0]) / 2, whole[0], rtol=1e-12, atol=0)
    for rank in ranks:
        for ours, expected in zip(rank[2:], whole[2:], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-13)
    # Gradient by the images: the sum of both ranks' losses, twice the mean that one process has.
    torch.testing.assert_close(torch.cat([r[1] for r in ranks], 1) / 2, whole[1], rtol=1e-9, atol=1e-13)


def whole_step(rank: int, world: int) -> dict[str, Tensor]:
    """The attack and the loss of a network with layer norm only, in float64, on this rank's share."""
    torch.manual_seed(0)
    small = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    pixels = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0, pretrained_cfg_overlay=pixels, **small)
    network = AdvCL(encoder, AdvCL.Objective(), Attack(steps=3), ViewConfig(padding=2, hfc_radius=2), ks=(3,))
    network.projector[1] = nn.Identity()
    network.double()
    images = torch.rand(4, BATCH, 3, 16, 16, dtype=torch.float64)
    noise = (2 * torch.rand(2, BATCH, 3, 16, 16, dtype=torch.float64) - 1) * 8 / 255
    labels = torch.arange(BATCH)[:, None] % 3
    share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    views, labels = Views(*images[:, share]), labels[share]
    clean = network.project([views.strong1, views.strong2, views.high_frequency], "clean")
    sources = network.sources(views)
    adversarial = network.perturb(sources, sources + noise[:, share], clean.detach(), labels)
    contrastive, pseudo_label = network.objective_terms(adversarial, clean, labels)
    (contrastive + 0.2 * pseudo_label).backward()
    gradient = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    return {"adversarial": adversarial, "contrastive": contrastive.detach(), "gradient": gradient}


def test_attack_and_step_equal_one_process() -> None:
    whole = whole_step(0, 1)
    ranks = run_ranks(whole_step, 2)
    torch.testing.assert_close(torch.cat([r["adversarial"] for r in ranks], 1), whole["adversarial"], rtol=0, atol=1e-12)
    torch.testing.assert_close(
        (ranks[0]["contrastive"] + ranks[1]["contrastive"]) / 2, whole["contrastive"], rtol=1e-10, atol=0
    )
    torch.testing.assert_close((ranks[0]["gradient"] + ranks[1]["gradient"]) / 2, whole["gradient"], rtol=1e-7, atol=1e-10)


def listed(rank: int, world: int) -> list[list[tuple[str, int]]]:
    """Some operations outside the mode and some inside, with one tensor or lists of them."""
    parallel = DistributedDataParallel(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), broadcast_buffers=True)
    x = torch.randn(4, 3)
    for _ in range(2):
        parallel(x).sum().backward()
    everyone = torch.empty(world, 5, dtype=torch.float64)
    with Collectives() as collectives:
        dist.all_reduce(torch.ones(7))
        dist.all_gather(list(everyone), everyone[rank])
        dist.broadcast(torch.ones(3, dtype=torch.uint8), 0)
    with Collectives() as step:
        parallel(x).sum().backward()
    assert collectives.bytes["reduce_scatter_"] == 0
    return [[tuple(record) for record in mode.records] for mode in (collectives, step)]


def communicated(rank: int, world: int, folder: str) -> dict[str, Any]:
    """The collective operations of the trainer's third step; before it DistributedDataParallel rebuilds its buckets."""
    # accelerate asks for an address, although the group exists already.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    tiny = ["data.source=fake:80", "data.size=16", "batch_size=12", "epochs=1", "optimizer.warmup_epochs=0", "attack.steps=3"]
    more = ["pseudo_labels.ks=[3]", "judge.every=0", "model_kwargs.channels=[16,16,16]", f"pseudo_labels.cache={folder}/labels"]
    trainer = Trainer(load_recipe("digits_demo", [*tiny, *more, "speed.mixed_precision=no"]), Path(folder) / "run")
    assert isinstance(trainer.model, DistributedDataParallel)
    batches = trainer.remaining_batches()
    for _ in range(2):
        trainer.train_step(*next(batches))
    with Collectives() as collectives:
        trainer.train_step(*next(batches))
    parameters = sum(p.numel() for p in trainer.core.parameters())
    assert parameters == sum(p.numel() for p in trainer.core.parameters() if p.requires_grad and p in trainer.optimizer.state)
    return {
        "records": [tuple(record) for record in collectives.records],
        "totals": dict(collectives.bytes),
        "listed": listed(rank, world),
        "parameters": parameters,
        "buffers": sum(b.numel() for b in trainer.core.buffers()),
    }


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(communicated, 2, str(tmp_path_factory.mktemp("counted")))


def test_what_a_step_communicates(counted: list[dict[str, Any]]) -> None:
    """The gradient once, and for each of the attack's losses and the last one the projections and their lse; nothing else."""
    share, views, dim = 12 // 2, 4, 128
    for rank in counted:
        gathers = [("allgather_", 4 * share * views * dim), ("allgather_", 4 * share * views)]
        reductions = [record for record in rank["records"] if record[0] == "allreduce_"]
        assert [record for record in rank["records"] if record not in reductions] == (3 + 1) * gathers
        assert sum(size for _, size in reductions) == 4 * rank["parameters"] > 0 < rank["buffers"]
        assert rank["totals"] == {"allreduce_": 4 * rank["parameters"], "allgather_": 16 * share * views * (dim + 1)}


def test_collectives_are_counted_with_their_bytes(counted: list[dict[str, Any]]) -> None:
    """Also that a broadcast of buffers would be seen."""
    for operations, step in [rank["listed"] for rank in counted]:
        assert operations == [("allreduce_", 28), ("allgather_", 40), ("broadcast_", 3)]
        assert {name for name, _ in step} == {"broadcast_", "allreduce_"}
        assert sum(size for name, size in step if name == "broadcast_") == 4 * 2 * 2 + 8
        assert [size for name, size in step if name == "allreduce_"] == [4 * (3 * 2 + 2 + 2 + 2)]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["advcl", "deacl"])
def test_pretraining_in_two_processes(method: str, tmp_path: Path) -> None:
    """The trainer itself under torchrun: both ranks take part, one writes; stopped and continued it ends the same, also where
    running averages decide the attack, of which each rank has its own."""
    more = ["objective.pseudo_label_weight=0"] if method == "advcl" else [f"start_from={export_teacher(tmp_path / 'teacher')}"]
    command = [
        *("-m", "train.pretrain", "digits_demo", "epochs=1"),
        *("optimizer.warmup_epochs=0", "attack.steps=1", "judge.every=1", "data.source=fake:200"),
        *("batch_size=32", "speed.mixed_precision=no", "model_kwargs.channels=[16,16,16]", f"method={method}", *more),
        *("--output", str(tmp_path / "run")),
    ]
    warm.run(*command, processes=2, code=0)
    records = read_log(tmp_path / "run")
    assert any("probe_robust" in r for r in records)
    results = (tmp_path / "run" / "export" / "results.json").read_text(encoding="utf-8")
    assert '"processes": 2' in results
    again = [*command[:-1], str(tmp_path / "stopped")]
    for budget, said in ((["--time-budget", "0s"], "torchrun --nproc_per_node 2 -m train.pretrain"), ([], "Exported")):
        done = warm.run(*again, *budget, processes=2, code=0)
        assert said in done.stdout + done.stderr
        assert load_checkpoint(tmp_path / "stopped").step == (1 if budget else 5)
    whole, continued = (load_checkpoint(tmp_path / name).tensors for name in ("run", "stopped"))
    assert [k for k in whole if not torch.equal(whole[k], continued[k])] == []
