"""From a recipe to a network, an optimizer and a schedule; compiled or with statistics over all processes, the same network."""

import copy
import itertools
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from timm.optim import Lamb, Lars
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from advcl_hub.pretraining import Method
from advcl_hub.pretraining.method import constant_parameters
from advcl_hub.training.layout import safe_channels_last
from tests.support.slow import slow
from tests.support.small_encoders import export_teacher
from tests.support.speed import channels_last, needs_compiler
from train.network import build_encoder, build_network, build_optimizer, build_schedule, compile_encoder
from train.recipe import Recipe, load_recipe
from train.start import open_start

SHAPE = (3, 16, 16)


def recipe(*overrides: str) -> Recipe:
    small = ["model_kwargs.channels=[16,16,16]", "pseudo_labels.ks=[3]", "speed.mixed_precision=no"]
    return load_recipe("digits_demo", [*small, *overrides])


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Graphs of other tests, and their number, must not matter; nor does pytest ask for the compiler's trace, which is slow."""
    trace = logging.getLogger("torch.__trace")
    level = trace.level
    trace.setLevel(logging.WARNING)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(cache_size_limit=64):
        yield
    torch._dynamo.reset()
    trace.setLevel(level)


def test_synchronised_batch_norm_changes_layers_but_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = build_network(recipe(), SHAPE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    synchronised = build_network(recipe("speed.sync_batch_norm=true"), SHAPE)
    norms = [m for m in synchronised.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(m, nn.SyncBatchNorm) for m in norms)
    assert len(norms) == sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in usual.modules())
    state = synchronised.state_dict()
    assert [k for k, v in usual.state_dict().items() if not torch.equal(v, state[k])] == []


def test_channels_last_where_it_corrupts_no_memory(caplog: pytest.LogCaptureFixture) -> None:
    """RepVGG's stem has a strided 1x1 convolution of three channels: two threads and an odd batch, and the process is gone."""
    wide = build_network(recipe("speed.channels_last=true"), SHAPE)
    assert wide.memory_format is torch.channels_last and channels_last(wide) and not caplog.messages
    narrow = recipe("speed.channels_last=true", "model_kwargs.channels=[8,8,16]")
    network = build_network(narrow, SHAPE)
    assert network.memory_format is torch.contiguous_format and not channels_last(network)
    assert caplog.messages == [
        "resnet8_cifar is trained contiguous: channels-last would corrupt memory on a CPU (oneDNN issue 6035)."
    ]
    assert safe_channels_last(network, torch.device("cuda"))
    assert build_network(narrow, SHAPE, torch.device("meta")).memory_format is torch.channels_last


@pytest.mark.parametrize(("name", "safe"), [("resnet18", True), ("mobilenetv3_small_050", True), ("repvgg_a0", False)])
def test_timms_networks_that_are_not_safe_channels_last(name: str, safe: bool) -> None:
    with torch.device("meta"):
        assert safe_channels_last(timm.create_model(name), torch.device("cpu")) is safe


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@needs_compiler
def test_a_compiled_step_equals_the_usual_one() -> None:
    images = torch.randint(256, (16, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(16)[:, None] % 3
    results = []
    for compiled in (False, True):
        network = build_network(recipe(), SHAPE)
        if compiled:
            compile_encoder(recipe(), network, SHAPE)
        torch.manual_seed(0)
        losses = network(images, labels)
        losses.total.backward()
        gradient = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
        results.append((torch.stack([x.detach() for x in losses]), gradient, network.state_dict()))
    (losses, gradient, state), (other_losses, other_gradient, other_state) = results
    torch.testing.assert_close(other_losses, losses, rtol=1e-3, atol=0)
    assert (other_gradient - gradient).norm() < 0.02 * gradient.norm()
    for name, value in state.items():  # every branch saw its own views
        torch.testing.assert_close(other_state[name], value, rtol=1e-2, atol=1e-3)


class StridedGradients(TorchDispatchMode):
    """Whether each strided convolution's gradient is taken channels-last."""

    def __init__(self) -> None:
        super().__init__()
        self.channels_last: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default and args[4] == [2, 2]:
            self.channels_last.append(any(x.is_contiguous(memory_format=torch.channels_last) for x in args[:2]))
        return func(*args, **kwargs or {})


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@needs_compiler
def test_the_compiler_does_not_choose_channels_last_where_it_corrupts_memory() -> None:
    r = recipe("model_kwargs.channels=[8,8,16]", "speed.channels_last=false")
    network = build_network(r, SHAPE)
    compile_encoder(r, network, SHAPE)
    network.eval()  # less to compile
    images = torch.rand(3, *SHAPE)
    network.features(images, network.branch.names[0]).sum().backward()  # compiles
    features = network.features(images, network.branch.names[0]).sum()
    with StridedGradients() as gradients:
        features.backward()
    assert gradients.channels_last == 4 * [False]  # a 3x3 and a 1x1 convolution in two blocks


def counted(network: Method) -> list[int]:
    """Compiles the encoder; every graph that there is later adds to the list."""
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        compiled.append(len(inputs))
        return graph.forward

    network.encoder.compile(fullgraph=True, backend=backend)
    return compiled


def passes(network: Method, shape: tuple[int, int, int]) -> None:
    """Every way in which training runs the encoder: each branch and mode, with parameter gradients or as in the attack."""
    for train, branch in itertools.product((True, False), network.branch.names):
        network.train(train)
        images = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
        network.features(images, branch).sum().backward()
        with constant_parameters(network):
            network.features(images.requires_grad_(), branch).sum().backward()
        with torch.no_grad():
            network.features(images.detach(), branch)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("model", "shape", "graphs"),
    [
        slow("resnet8_cifar model_kwargs={channels: [16, 16, 16]}", SHAPE, 18),
        slow(
            "convnext_atto model_kwargs={depths: [1, 1, 1, 1], dims: [8, 8, 8, 8]}", (3, 32, 32), 6
        ),  # no batch norm, no branch
        ("vit_tiny_patch16_224 model_kwargs={img_size: 16, patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2}", SHAPE, 6),
    ],
)
def test_every_branch_and_mode_is_one_graph(model: str, shape: tuple[int, int, int], graphs: int) -> None:
    """`fullgraph=True` raises at a graph break; each graph is compiled once, then used."""
    name, _, arguments = model.partition(" ")
    r = load_recipe("digits_demo", [f"model={name}", arguments, "pseudo_labels.ks=[3]"])
    network = build_network(r, shape)
    compiled = counted(network)
    passes(network, shape)
    assert len(compiled) == graphs
    passes(network, shape)
    assert len(compiled) == graphs


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """Of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler", "process_group")
def test_distributed_data_parallel_leaves_the_graphs_whole() -> None:
    """Buckets of one kilobyte: torch would cut at almost every parameter."""
    images, labels = torch.zeros(3, *SHAPE, dtype=torch.uint8), torch.zeros(3, 1, dtype=torch.int64)
    graphs = []
    for parallel in (False, True):
        network = build_network(recipe(), SHAPE)
        compile_encoder(recipe(), network, SHAPE)
        compiled = counted(network)
        model = DistributedDataParallel(network, bucket_cap_mb=0.001) if parallel else network
        model(images, labels).total.backward()
        graphs.append(len(compiled))
    assert graphs[0] == graphs[1] > 0


class Breaks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.mean()) > 0 else -x


@pytest.mark.usefixtures("fresh_compiler")
def test_a_graph_break_is_found_before_training() -> None:
    r = recipe("speed.compile=true")
    network = build_network(r, SHAPE)
    network.encoder.act1 = Breaks()
    with pytest.raises(ValueError, match=r"^resnet8_cifar cannot be compiled as one graph: .+; set speed.compile=false\.$"):
        compile_encoder(r, network, SHAPE)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("synchronised", [False, True])
def test_compiling_asks_for_one_graph_and_leaves_the_network_as_it_is(
    synchronised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch compiles around SyncBatchNorm, graph by graph; the trial pass moves no statistics."""
    network = build_network(recipe(), SHAPE)
    before = copy.deepcopy(network.state_dict())
    asked: list[dict[str, Any]] = []
    compiles = nn.Module.compile

    def spy(module: nn.Module, **options: Any) -> None:
        asked.append(options)
        compiles(module, **options)

    monkeypatch.setattr(nn.Module, "compile", spy)
    compile_encoder(recipe(f"speed.sync_batch_norm={str(synchronised).lower()}"), network, SHAPE)
    assert asked[-1] == {"fullgraph": not synchronised, "options": None}
    assert [k for k, v in network.state_dict().items() if not torch.equal(v, before[k])] == []


def test_the_learning_rate_warms_up_and_falls_to_its_minimum() -> None:
    settings = ["epochs=10", "optimizer.lr=0.4", "optimizer.warmup_epochs=2", "optimizer.warmup_lr=0.1"]
    r = recipe(*settings, "optimizer.min_lr_ratio=0.01")
    optimizer = build_optimizer(r, nn.Linear(2, 2))
    schedule = build_schedule(r, optimizer, steps_per_epoch=50)
    rates = []
    for step in range(500):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.1) and rates[50] == pytest.approx(0.25)  # linear: half-way after one epoch
    # The cosine runs over all steps; the warm-up covers its start.
    cosine = [0.004 + 0.396 * (1 + math.cos(math.pi * step / 500)) / 2 for step in range(100, 500)]
    assert rates[100:] == pytest.approx(cosine)


KINDS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "lars": Lars, "lamb": Lamb}


@pytest.mark.parametrize("name", KINDS)
def test_the_optimizer_has_every_trained_parameter_in_order(name: str) -> None:
    network = build_network(recipe(), SHAPE)
    frozen = next(network.parameters()).requires_grad_(False)
    optimizer = build_optimizer(recipe(f"optimizer.name={name}", "optimizer.weight_decay=0.05"), network)
    assert type(optimizer) is KINDS[name]
    (group,) = optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in network.parameters() if p is not frozen]
    assert group["weight_decay"] == 0.05 and group.get("momentum", 0.9) == 0.9 and not group.get("nesterov")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("decay", [0.05, 1e-6])
def test_norms_and_biases_need_not_decay(name: str, decay: float) -> None:
    network = build_network(recipe(), SHAPE)
    frozen = next(network.parameters()).requires_grad_(False)
    settings = [f"optimizer.weight_decay={decay}", "optimizer.decay_norms_and_biases=false"]
    optimizer = build_optimizer(recipe(f"optimizer.name={name}", "optimizer.momentum=0.8", *settings), network)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {id(p): decay if p.ndim > 1 else 0.0 for p in network.parameters() if p is not frozen}
    assert all(group.get("momentum", 0.8) == 0.8 for group in optimizer.param_groups)


def test_sgd_is_that_of_torch_with_plain_momentum_bit_by_bit() -> None:
    """As published, whatever timm means by sgd."""
    network = build_network(recipe(), SHAPE)
    other = copy.deepcopy(network)
    optimizer = build_optimizer(recipe("optimizer.lr=0.3", "optimizer.weight_decay=0.01"), network)
    reference = torch.optim.SGD(other.parameters(), 0.3, momentum=0.9, weight_decay=0.01)
    assert optimizer.defaults == reference.defaults
    for step in range(3):
        for module, rule in ((network, optimizer), (other, reference)):
            generator = torch.Generator().manual_seed(step)
            for p in module.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            rule.step()
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))


def test_lars_scales_what_decays_and_takes_the_plain_rate_for_the_rest() -> None:
    """You et al., arXiv 1708.03888: rate * 0.001 |w| / (|g| + decay |w|)."""
    network = nn.Linear(4, 3)
    weight, bias = network.weight.detach().clone(), network.bias.detach().clone()
    optimizer = build_optimizer(
        recipe("optimizer.name=lars", "optimizer.lr=5", "optimizer.weight_decay=0.1", "optimizer.decay_norms_and_biases=false"),
        network,
    )
    for p in network.parameters():
        p.grad = torch.full_like(p, 0.5)
    optimizer.step()
    ratio = 0.001 * weight.norm() / (torch.full_like(weight, 0.5).norm() + 0.1 * weight.norm())
    torch.testing.assert_close(network.weight.detach(), weight - 5 * ratio * (0.5 + 0.1 * weight))
    torch.testing.assert_close(network.bias.detach(), bias - 5 * 0.5)


def test_every_group_follows_the_schedule() -> None:
    r = recipe("epochs=10", "optimizer.name=lamb", "optimizer.decay_norms_and_biases=false")
    optimizer = build_optimizer(r, nn.Linear(2, 2))
    single = build_optimizer(recipe("epochs=10"), nn.Linear(2, 2))
    for step in (0, 30, 80, 499):
        for each in (optimizer, single):
            build_schedule(r, each, steps_per_epoch=50).step_update(step)
        assert [group["lr"] for group in optimizer.param_groups] == [single.param_groups[0]["lr"]] * 2


def test_the_encoder_takes_images_as_they_are() -> None:
    cfg = build_encoder(recipe(), SHAPE).pretrained_cfg
    assert (cfg["mean"], cfg["std"], cfg["input_size"]) == ((0.0,) * 3, (1.0,) * 3, SHAPE)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=resnet18_cifr"], "Did you mean resnet18_cifar"),
        (["model_kwargs={drop_pth: 1}"], "drop_pth"),
        (["model=vit_tiny_patch16_224", "model_kwargs={img_size: 32}"], "does not take 3x16x16 images"),
        (["model=resnet8_cifar", "model_kwargs={global_pool: ''}"], "set model_kwargs.global_pool"),
    ],
)
def test_networks_that_cannot_be_built(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_encoder(load_recipe("digits_demo", overrides), SHAPE)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("method", ["pseudo_label_at", slow("deacl")])
def test_networks_beside_the_encoder_compile_as_one_graph_and_follow_its_weights(method: str, tmp_path: Path) -> None:
    """Two steps with a change of weights between them: whatever a graph holds of the first would show in the second."""
    start = open_start(recipe(f"start_from={export_teacher(tmp_path / 'teacher')}"))
    network = build_network(recipe(f"method={method}", "start_from=x", "attack.steps=2"), SHAPE, start=start)
    compiled = copy.deepcopy(network)
    assert len(network.networks) == {"deacl": 3, "pseudo_label_at": 2}[method]  # encoder, its folded copy, and the teacher
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(len(inputs))
        return graph.forward

    for module in compiled.networks:
        module.compile(fullgraph=True, backend=backend)
    images = torch.randint(256, (8, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8)[:, None] % 3
    for count in (len(network.networks), len(network.networks)):  # a graph for each network, none in the second step
        results = []
        for model in (network, compiled):
            model.train()
            torch.manual_seed(1)
            losses = model(images, labels)
            model.zero_grad()
            losses.total.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(parameter.grad, alpha=0.1)
            results.append(torch.stack(list(losses)))
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
        assert len(graphs) == count
