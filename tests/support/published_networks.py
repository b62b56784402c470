"""The networks of the published codes, with their keys and nothing of timm: what `convert` is tested with."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DEACL = ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261))
KUANGLIU = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
NARROW, WIDE = (4, 6, 8, 10), (64, 128, 256, 512)
DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


class BranchedNorm(nn.Module):
    """`bn_list`, one batch norm a branch."""

    def __init__(self, norm: type[nn.Module], width: int, count: int):
        super().__init__()
        self.bn_list = nn.ModuleList(norm(width) for _ in range(count))
        self.active = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.bn_list[self.active](x)


class Block(nn.Module):
    """A residual block whose shortcut is `downsample.conv`/`.bn`, `downsample.0`/`.1` or `shortcut.0`/`.1`."""

    def __init__(self, inputs: int, width: int, stride: int, published: "Published"):
        super().__init__()
        kernels = (1, 3, 1) if published.depth == 50 else (3, 3)
        outputs = width * (4 if published.depth == 50 else 1)
        self.names = [f"conv{i}" for i in range(1, len(kernels) + 1)]
        channels, strided = inputs, kernels.index(3)
        for i, kernel in enumerate(kernels):
            last = outputs if i == len(kernels) - 1 else width
            step = stride if i == strided else 1
            self.add_module(f"conv{i + 1}", nn.Conv2d(channels, last, kernel, step, kernel // 2, bias=False))
            self.add_module(f"bn{i + 1}", published.norm(last))
            channels = last
        self.attribute, *parts = published.shortcut
        shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            shortcut.add_module(parts[0], nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            shortcut.add_module(parts[1], published.norm(outputs))
        self.add_module(self.attribute, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for name in self.names:
            out = getattr(self, name.replace("conv", "bn"))(getattr(self, name)(out if name == "conv1" else out.relu()))
        return F.relu(out + getattr(self, self.attribute)(x))


class Normalize(nn.Module):
    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean[:, None, None]) / self.std[:, None, None]


class Published(nn.Module):
    """A published ResNet with a value of its own in every weight, statistic and counter."""

    def __init__(
        self,
        shortcut: tuple[str, str, str],
        branches: int = 0,
        *,
        depth: int = 18,
        widths: tuple[int, ...] = NARROW,
        head: str = "",
        classes: int = 3,
        normalize: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
        large_stem: bool = False,
        stem_padding: int = 1,
        seed: int = 0,
    ):
        super().__init__()
        self.shortcut, self.branches, self.depth, self.head, self.large_stem = shortcut, branches, depth, head, large_stem
        self.normalize = Normalize(*normalize) if normalize else nn.Sequential()
        inputs = widths[0]
        stem = (7, 2, 3) if large_stem else (3, 1, stem_padding)
        self.conv1 = nn.Conv2d(3, inputs, *stem, bias=False)
        self.bn1 = self.norm(inputs)
        for stage, (width, blocks) in enumerate(zip(widths, DEPTHS[depth], strict=True)):
            layer = nn.Sequential()
            for i in range(blocks):
                layer.append(Block(inputs, width, 2 if stage and not i else 1, self))
                inputs = width * (4 if depth == 50 else 1)
            self.add_module(f"layer{stage + 1}", layer)
        self.width = inputs
        if head:
            self.add_module(head, nn.Linear(inputs, classes))
        self.randomize(seed)

    def norm(self, width: int) -> nn.Module:
        return BranchedNorm(nn.BatchNorm2d, width, self.branches) if self.branches else nn.BatchNorm2d(width)

    def randomize(self, seed: int) -> "Published":
        generator = torch.Generator().manual_seed(seed)
        for i, (key, value) in enumerate(self.state_dict().items()):
            noise = torch.randn(value.shape, generator=generator)
            if key.endswith("num_batches_tracked"):
                value.fill_(1000 + i)
            elif key.endswith("running_var"):
                value.copy_(1 + 0.5 * noise.tanh())
            elif value.ndim > 1:
                value.copy_(noise * (2 / value[0].numel()) ** 0.5)
            elif not key.startswith("normalize."):
                value.copy_(0.1 * noise + (0.7 if key.endswith("weight") else 0))
        return self.eval()

    def use(self, branch: int) -> "Published":
        for module in self.modules():
            if isinstance(module, BranchedNorm):
                module.active = branch
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(self.normalize(x))).relu()
        if self.large_stem:
            x = F.max_pool2d(x, 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))
        return getattr(self, self.head)(x) if self.head else x


def mlp(*widths: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(*widths[:2]), nn.BatchNorm1d(widths[1]), nn.ReLU(), nn.Linear(*widths[1:]))


def advcl(**arguments: Any) -> Published:
    """What AdvCL's pretraining saves, with all its heads."""
    network = Published(("downsample", "conv", "bn"), 3, **arguments)
    for k in (2, 10, 50, 100, 500):
        network.add_module(f"fc_{k:03d}", nn.Linear(network.width, k))
    network.add_module("head_ce", mlp(network.width, network.width, 1000))
    network.add_module("head_proj", mlp(network.width, network.width, 128))
    network.add_module("head_pred", mlp(128, 128, 128))
    return network


def advcl_finetuned(**arguments: Any) -> Published:
    """What AdvCL's linear finetuning saves as `model`: its head `linear` is not the one that was trained."""
    network = Published(("shortcut", "0", "1"), **arguments)
    network.add_module("linear", nn.Linear(network.width, 10))
    for name, widths in (("head_proj", (network.width, network.width, 128)), ("head_pred", (128, 128, 128))):
        network.add_module(name, nn.Sequential(nn.Linear(*widths[:2]), nn.ReLU(), nn.Linear(*widths[1:])))
    return network


def acl(branches: int = 2, **arguments: Any) -> Published:
    """What ACL's pretraining saves: a projection head called `fc`, with branches too."""
    network = Published(("downsample", "conv", "bn"), branches, normalize=IMAGENET, **arguments)
    if not network.head:
        projector = nn.Sequential()
        for i in (1, 2, 3):
            projector.add_module(f"fc{i}", nn.Linear(network.width, network.width, bias=i == 1))
            projector.add_module(f"bn{i}", BranchedNorm(nn.BatchNorm1d, network.width, branches))
        network.add_module("fc", projector)
    return network


def acl_finetuned(**arguments: Any) -> Published:
    return Published(("downsample", "0", "1"), **{"normalize": IMAGENET, "head": "fc", **arguments})


def kuangliu(**arguments: Any) -> Published:
    return Published(("shortcut", "0", "1"), **{"head": "linear", **arguments})


class Solo(nn.Module):
    """A module of solo-learn as Lightning saves it: a network, its linear head, and what a method adds to them."""

    def __init__(self, seed: int = 0, momentum: bool = False, name: str = "backbone", **arguments: Any):
        super().__init__()
        copies = {name: seed, f"momentum_{name}": seed + 10} if momentum else {name: seed}
        for copy, own in copies.items():
            self.add_module(copy, Published(("downsample", "0", "1"), stem_padding=2, seed=own, **arguments))
        self.width = self.get_submodule(name).width
        self.add("classifier", nn.Linear(self.width, 3))

    def add(self, name: str, part: nn.Module) -> nn.Module:
        """Adds a part with a value of its own in every weight and statistic."""
        generator = torch.Generator().manual_seed(len(self.state_dict()))
        for value in part.state_dict().values():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(0.5 + noise.abs() if value.ndim == 1 else noise / value.shape[-1] ** 0.5 if value.ndim else noise)
        self.add_module(name, part.eval())
        return part


def solo_simclr(**arguments: Any) -> Solo:
    """What solo-learn's SimCLR saves: a projection head without batch norms."""
    network = Solo(**arguments)
    network.add("projector", nn.Sequential(nn.Linear(network.width, 16), nn.ReLU(), nn.Linear(16, 8)))
    return network


def solo_simsiam(**arguments: Any) -> Solo:
    """SimSiam's projection head has linear layers without biases, and a last batch norm without weights."""
    network = Solo(**arguments)
    layers = (nn.Linear(network.width, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16, bias=False))
    last = (nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8), nn.BatchNorm1d(8, affine=False))
    network.add("projector", nn.Sequential(*layers, *last))
    network.add("predictor", mlp(8, 4, 8))
    return network


def solo_moco(**arguments: Any) -> Solo:
    """What MoCo v2+ saves: a second copy of the network and its heads, and a queue."""
    network = Solo(momentum=True, **arguments)
    for name in ("projector", "momentum_projector"):
        network.add(name, nn.Sequential(nn.Linear(network.width, 16), nn.ReLU(), nn.Linear(16, 8)))
    network.add("momentum_classifier", nn.Linear(network.width, 3))
    network.register_buffer("queue", torch.ones(2, 8, 12))
    network.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
    return network


def deacl(**arguments: Any) -> Solo:
    """What DeACL's second stage saves: the robust student, the clean teacher, and two linear heads of the student."""
    network = Solo(momentum=True, **{"normalize": DEACL, **arguments})
    network.add("classifier_adv", nn.Linear(network.width, 3))
    return network


def profeat(finetuned: bool = False) -> Solo:
    """What ProFeAT saves of its student, or of its linear finetuning, whose head is `fc`."""
    network = solo_simclr(normalize=((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)))
    if finetuned:
        head = network.classifier
        del network.classifier, network.projector
        network.add_module("fc", head)
    return network
