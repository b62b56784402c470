"""How the published codes name the parts of a ResNet, and which of them becomes which part of timm's.

| layout   | code                                      | shortcut        | batch norm      | head                      |
|----------|-------------------------------------------|-----------------|-----------------|---------------------------|
| advcl    | LijieFan/AdvCL, pretraining               | downsample.conv | bn1.bn_list.0-2 | none (`fc`, if added)     |
| advcl    | its finetuning                            | shortcut.0      | bn1             | the entry `classifier`    |
| acl      | VITA-Group/Adversarial-Contrastive-       | downsample.conv | bn1.bn_list.0-1 | fc                        |
|          | Learning, PKU-ML/DYNACL, DynACL-AIR       |                 |                 |                           |
| acl      | the same after finetuning, DynACL++       | downsample.0    | bn1             | fc                        |
| kuangliu | kuangliu/pytorch-cifar and its followers  | shortcut.0      | bn1             | linear                    |
| solo     | vturrisi/solo-learn, pantheon5100/DeACL,  | downsample.0    | bn1             | classifier (fc in         |
|          | val-iisc/ProFeAT: all in `backbone.`      |                 |                 | ProFeAT's finetuning)     |

The networks of `solo` pad the images of their 3x3 stem by 2 pixels. The weights do not tell: it follows from the layout.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from advcl_hub.hub.converters.checkpoint import HEAD_ENTRY, SOLO
from advcl_hub.hub.projector import projector_from_state

LAYOUTS = ("advcl", "acl", "kuangliu", "solo")
_BRANCHED = re.compile(r"\.bn_list\.(\d+)\.")
_COUNTER = ".num_batches_tracked"


@dataclass(frozen=True)
class Layout:
    """The names of one published network.

    Attributes:
        name: of the layout, one of `LAYOUTS`.
        convolution, norm: of a block's shortcut.
        head: the linear classifier.
        branches: our names of `bn_list.0`, `bn_list.1` ..., empty for a network with one batch norm.
        heads: patterns of what the encoder does without, with the reason.
        fixed_size: whether the network takes 32x32 images only (a 4x4 average pooling, flattened).
        root: what stands before the encoder's keys, `backbone.`, or empty.
        projector: the projection head, if it is an nn.Sequential of linear layers, batch norms and ReLU; else empty.
        stem_padding: pixels that a 3x3 stem adds on each side of the image.
    """

    name: str
    convolution: str
    norm: str
    head: str
    branches: tuple[str, ...] = ()
    heads: tuple[tuple[str, str], ...] = ()
    fixed_size: bool = False
    root: str = ""
    projector: str = ""
    stem_padding: int = 1

    def __str__(self) -> str:
        kind = f"{len(self.branches)} batch-norm branches" if self.branches else "one batch norm"
        place = f" in {self.root}*" if self.root else ""
        return f"{self.name!r} ({kind}, {self.convolution}{place})"

    @property
    def normalize(self) -> tuple[str, str]:
        """Buffers that the networks of ACL, DeACL and ProFeAT have: what they subtract from images and divide them by."""
        return f"{self.root}normalize.mean", f"{self.root}normalize.std"


_PROJECTION = "projection head"
_ADVCL_HEADS = (
    (r"head_proj\.", _PROJECTION),
    (r"head_pred\.", "prediction head, which the published losses never use"),
    (r"head_ce\.", "nonlinear pseudo-label head, which the published losses never use"),
    (r"fc_\d+\.", "pseudo-label heads"),
)
_ACL_HEADS = ((r"fc\.(fc|bn)[123]\.", _PROJECTION),)
_ADVCL_FINETUNED = (
    *_ADVCL_HEADS[:2],
    (r"linear\.", f"a head that the published finetuning never trains (it trains the one in {HEAD_ENTRY!r})"),
)
_SOLO_HEADS = (
    (r"classifier_adv\.", "a second linear head, which DeACL's training never trains"),
    (r"predictor2?\.", "prediction head"),
    (r"prototypes\.", "prototypes of clusters"),
    (r"(queue(_\w+)?|local_memory_\w+)$", "memory of features"),
    (r"(momentum_)?head\.|dino_loss_func\.", "DINO's head and loss"),
    (r"transformer_encoder\.|pos_enc\.", "All4One's transformer"),
)
_ADVCL = Layout(
    *("advcl", "downsample.conv", "downsample.bn", "fc", ("clean", "adv", "adv_ce"), _ADVCL_HEADS), projector="head_proj"
)
_ACL = Layout("acl", "downsample.conv", "downsample.bn", "fc", ("clean", "adv"), _ACL_HEADS)
_FINETUNED_ADVCL = Layout(
    *("advcl", "shortcut.0", "shortcut.1", f"{HEAD_ENTRY}.fc", (), _ADVCL_FINETUNED, True), projector="head_proj"
)
_FINETUNED_ACL = Layout("acl", "downsample.0", "downsample.1", "fc", (), _ACL_HEADS)
_KUANGLIU = Layout("kuangliu", "shortcut.0", "shortcut.1", "linear", fixed_size=True)


def detect_layout(keys: Collection[str], asked: str = "auto") -> Layout:
    """The layout that a state dict's keys follow.

    Args:
        keys: of the state dict.
        asked: the layout that it is said to follow, which matters where the keys do not tell; or `auto`.

    Raises:
        ValueError: none of them; a network of another known code is named.
    """
    tops = {key.partition(".")[0] for key in keys}
    advcl = tops & {"head_proj", "head_pred", "head_ce"} or any(re.match(r"fc_\d+$", top) for top in tops)
    branches = {int(match[1]) for key in keys if (match := _BRANCHED.search(key))}
    shortcuts = {match[1] for key in keys if (match := re.match(r"layer\d\.\d+\.((?:shortcut|downsample)\.\w+)\.", key))}
    if copy := next((copy for copy in SOLO if copy in tops), None):
        return _solo(keys, copy, asked)
    if any(".bn_branches." in key for key in keys):
        raise ValueError("is the checkpoint of a run of advcl-hub: take the folder export in the folder of that run")
    if branches:
        return _ADVCL if advcl or 2 in branches else _ACL
    if "shortcut.0" in shortcuts:
        if "shortcut.1" not in shortcuts:
            raise ValueError("looks like a pre-activation ResNet (no batch norm in its shortcuts), which no layout here covers")
        return _FINETUNED_ADVCL if advcl else _KUANGLIU
    if "downsample.0" in shortcuts:
        return _FINETUNED_ACL
    shown = ", ".join(list(keys)[:4])
    raise ValueError(f"follows none of the layouts {', '.join(LAYOUTS)}: its {len(keys)} keys are {shown} ...")


def _solo(keys: Collection[str], copy: str, asked: str) -> Layout:
    """The layout of solo-learn and its followers for one copy of the network, which has all its keys below `copy`.

    Other codes call an encoder `backbone` too, and pad its stem by 1 pixel, which the weights do not tell. So the file has to
    have what the files of these codes always have: the linear head that they train beside the encoder, or the normalisation.

    Raises:
        ValueError: another network than torchvision's ResNet; or no such mark, and `asked` is not `solo`.
    """
    if not {f"{copy}.layer1.0.conv1.weight", f"{copy}.layer2.0.downsample.0.weight"} <= set(keys):
        raise ValueError(
            f"has no ResNet with torchvision's names in {copy}.*, which is what is converted of solo-learn, DeACL and ProFeAT: "
            f"its keys are {', '.join([key for key in keys if key.startswith(copy)][:4])} ..."
        )
    marked = copy.endswith("backbone") and any(key in keys for key in ("classifier.weight", f"{copy}.normalize.mean"))
    if not marked and asked != "solo":
        raise ValueError(
            f"has a ResNet in {copy}.*, but not what marks the files of solo-learn, DeACL and ProFeAT (classifier.* beside "
            "backbone.*, or backbone.normalize.*): if it is one of theirs, whose stems pad images by 2 pixels, ask for the "
            "layout solo"
        )
    own, other = ("momentum_", "") if copy.startswith("momentum_") else ("", "momentum_")
    head = f"{own}classifier" if own or "classifier.weight" in keys else "fc"
    heads = (
        (rf"{own}projector\.", _PROJECTION),
        (rf"{other}(classifier|projector)\.", "heads of the other copy of the network"),
        *_SOLO_HEADS,
    )
    layout = Layout("solo", "downsample.0", "downsample.1", head, (), heads)
    return replace(layout, root=f"{copy}.", projector=f"{own}projector", stem_padding=2)


@dataclass(frozen=True)
class Outline:
    """What the shapes of a checkpoint tell about its network, as far as a timm model needs it.

    Attributes:
        architecture: a timm name.
        channels: width of each stage.
        size: side of the images it is made for, in pixels.
        reduction: by how much the last feature map is smaller.
        stem_padding: pixels that a 3x3 stem adds on each side of the image.
    """

    architecture: str
    channels: tuple[int, ...]
    size: int
    reduction: int
    stem_padding: int = 1

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of `timm.create_model`, none for the architecture's own widths and stem."""
        widths = {} if self.channels == _WIDTHS else {"channels": list(self.channels)}
        return widths | ({} if self.stem_padding == 1 else {"stem_padding": self.stem_padding})


_WIDTHS = (64, 128, 256, 512)
_DEPTHS = {"resnet18": (False, (2, 2, 2, 2)), "resnet34": (False, (3, 4, 6, 3)), "resnet50": (True, (3, 4, 6, 3))}
ARCHITECTURES = tuple(f"{name}_cifar" for name in _DEPTHS)


def outline(state: Mapping[str, Tensor], layout: Layout, architecture: str | None = None) -> Outline:
    """Reads the architecture off the keys and shapes.

    Args:
        state: the checkpoint's.
        layout: that it follows.
        architecture: what it has to be, None for whatever it is.

    Raises:
        ValueError: no architecture of these depths, blocks and stem.
    """
    state = {key.removeprefix(layout.root): value for key, value in state.items() if key.startswith(layout.root)}
    blocks = [re.match(r"layer([1-4])\.(\d+)\.", key) for key in state]
    depths = tuple(1 + max((int(b[2]) for b in blocks if b and int(b[1]) == stage), default=-1) for stage in (1, 2, 3, 4))
    bottleneck = "layer1.0.conv3.weight" in state
    stem = state["conv1.weight"].shape[-1] if "conv1.weight" in state and state["conv1.weight"].ndim == 4 else 3
    # ACL's and DynACL's networks for STL-10 have torchvision's stem.
    suffix, size, reduction = ("", 96, 32) if stem == 7 and layout.name == "acl" else ("_cifar", 32, 8)
    if stem == 7 and layout.name == "solo":
        raise ValueError(
            f"has the 7x7 stem of solo-learn's networks for large images (STL-10, ImageNet), of which those for CIFAR are "
            f"converted: this one is torchvision's ResNet, whose keys in {layout.root}* timm's resnet18 and resnet50 load"
        )
    known = [name + suffix for name, kind in _DEPTHS.items() if kind == (bottleneck, depths)]
    if architecture is not None:
        if architecture not in (choices := [name + suffix for name in _DEPTHS]):
            raise ValueError(f"is converted to {', '.join(choices)}, not to {architecture}")
    elif not known:
        kind = "bottleneck" if bottleneck else "basic"
        raise ValueError(f"is a ResNet of {kind} blocks, {depths} in its stages; converted are {', '.join(ARCHITECTURES)}")
    first = [state.get(f"layer{stage}.0.conv1.weight") for stage in (1, 2, 3, 4)]
    widths = tuple(default if w is None or w.ndim != 4 else w.shape[0] for w, default in zip(first, _WIDTHS, strict=True))
    return Outline(architecture or known[0], widths if suffix else _WIDTHS, size, reduction, layout.stem_padding)


@dataclass(frozen=True)
class Placement:
    """Where everything in a checkpoint goes.

    Attributes:
        state: for `model.load_state_dict`, strictly.
        dropped: published keys that the model does without, by reason.
    """

    state: dict[str, Tensor]
    dropped: dict[str, list[str]]


def place(state: Mapping[str, Tensor], layout: Layout, branch: str | None, model: nn.Module, without: str) -> Placement:
    """Gives every key of a checkpoint its place in a timm model, or a reason to be left out.

    Args:
        state: the checkpoint's.
        layout: that it follows.
        branch: whose batch norms to take, None for a network with one.
        model: of the checkpoint's architecture, with as many classes as its head if that is kept.
        without: why the head is left out, empty if it is kept.

    Raises:
        ValueError: keys that have no place, are missing, of another shape or not of floats; all of them are listed.
    """
    expected = model.state_dict()
    targets = {
        _published(target, layout, owner): (target, owner) for target in expected for owner in layout.branches or (None,)
    }
    placed: dict[str, str] = {}
    dropped: dict[str, list[str]] = defaultdict(list)
    problems = []
    for key, value in state.items():
        target, owner = targets.get(key, ("", None))
        if reason := _reason(key, layout, without):
            dropped[reason].append(key)
        elif not target:
            problems.append(f"unknown key {key}")
        elif value.shape != expected[target].shape:
            problems.append(f"shape of {key}: {tuple(value.shape)}, the model has {tuple(expected[target].shape)}")
        elif not value.is_floating_point() and not target.endswith(_COUNTER):
            problems.append(f"type of {key}: {str(value.dtype).removeprefix('torch.')}, not floats")
        elif not value.isfinite().all():
            problems.append(f"values of {key}: not all are finite")
        elif _is_norm(target) and owner != branch:
            dropped[f"batch norms of branch {owner}"].append(key)
        else:
            placed[target] = key
    counted = any(key.endswith(_COUNTER) for key in state)  # PyTorch before 0.4.1 had no counters
    wanted = {target: _published(target, layout, branch) for target in expected if counted or not target.endswith(_COUNTER)}
    problems += [f"missing key {key}" for key in wanted.values() if key not in state]
    if problems:
        raise ValueError(f"is no complete network of the layout {layout}:\n  " + "\n  ".join(problems))
    counters = {target: value.clone() for target, value in expected.items() if target.endswith(_COUNTER)}
    return Placement(counters | {target: state[key] for target, key in placed.items()}, dict(dropped))


def projection_head(state: Mapping[str, Tensor], layout: Layout, width: int) -> nn.Sequential:
    """The projection head in a checkpoint, in evaluation mode, in float32.

    Its keys have the numbers of its layers: `projector.0.weight` is of a linear layer, `projector.1.running_mean` of a batch
    norm. A number without keys is a ReLU, as in all codes of these layouts but VIbCReg of solo-learn, which has GELU.

    Args:
        state: the checkpoint's.
        layout: that it follows.
        width: number of features of the encoder.

    Raises:
        ValueError: there is none, or it is not of such layers, or not behind this encoder.
    """
    start = f"{layout.projector}."
    own = {key.removeprefix(start): value for key, value in state.items() if layout.projector and key.startswith(start)}
    if not own:
        kept = f"{start}*" if layout.projector else "projector.* or head_proj.*"
        raise ValueError(f"has no projection head that can be kept: it has no keys {kept} (keep_projector)")
    try:
        head = projector_from_state(own)
    except ValueError as error:
        raise ValueError(f"has a projection head {start}* that cannot be kept (keep_projector): {error}") from None
    kinds = [type(layer) for layer in head]
    if kinds[0] is not nn.Linear or (nn.ReLU, nn.ReLU) in pairwise(kinds):
        numbers = ", ".join(sorted({key.partition(".")[0] for key in own}, key=int))
        raise ValueError(
            f"has a projection head {start}* with keys for its layers {numbers} only: what the others are is not known, so it "
            "cannot be kept (keep_projector)"
        )
    if head[0].in_features != width:
        raise ValueError(f"has a projection head {start}* of {head[0].in_features} features, but its encoder has {width}")
    return head


def _published(target: str, layout: Layout, branch: str | None) -> str:
    """The published key of one of timm's."""
    part, _, leaf = target.rpartition(".")
    published = layout.head if part == "fc" else f"{layout.root}{part}"
    published = published.replace("downsample.0", layout.convolution).replace("downsample.1", layout.norm)
    if branch is not None and _is_norm(target):
        published += f".bn_list.{layout.branches.index(branch)}"
    return f"{published}.{leaf}"


def _is_norm(target: str) -> bool:
    return re.search(r"(^|\.)(bn\d|downsample\.1)\.\w+$", target) is not None


def _reason(key: str, layout: Layout, without: str) -> str:
    """Why the model does without a key, empty if it does not."""
    if key in layout.normalize:
        return "normalisation of the images, which the config has"
    if without and re.fullmatch(rf"{re.escape(layout.head)}\.(weight|bias)", key):
        return without
    return next((why for pattern, why in layout.heads if re.match(pattern, key)), "")
