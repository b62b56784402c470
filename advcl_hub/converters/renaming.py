"""State dicts under other names: published ones become those of our networks, key by key, or are refused."""

import re
from collections.abc import Callable, Mapping

from torch import Tensor, nn

_ADVCL_BRANCHES = ("clean", "adv", "adv_ce")  # published as bn_list.0/1/2: normal, pgd, pgd_ce
_COUNTER = ".num_batches_tracked"
# Two heads that the published class has and the published training never uses; our network has neither.
_UNUSED_HEADS = ("head_pred.", "head_ce.", "module.head_pred.", "module.head_ce.")


def _rename_advcl(key: str) -> str:
    if match := re.fullmatch(r"fc_(\d+)\.(weight|bias)", key):
        return f"heads.{int(match[1])}.{match[2]}"
    if key.startswith("head_proj."):
        return key.replace("head_proj.", "projector.", 1)
    key = key.replace("downsample.conv.", "downsample.0.").replace("downsample.bn.", "downsample.1.")
    key = re.sub(
        r"\.bn_list\.(\d)\.",
        lambda m: f".bn_branches.{_ADVCL_BRANCHES[int(m[1])]}." if int(m[1]) < len(_ADVCL_BRANCHES) else m[0],
        key,
    )
    return f"encoder.{key}"


def convert_advcl(published: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Renames a checkpoint of the published AdvCL code (`bn_list` layout) to the keys of our pretraining network.

    Args:
        published: the checkpoint's state dict; a leading `module.` of every key is removed. Its `head_pred` and `head_ce`, on
            which no published loss depends, are left out.
        model: the network it is for: `encoder` (resnet18_cifar with branches clean, adv, adv_ce), `projector` and `heads`.

    Returns:
        A state dict that `model.load_state_dict` takes strictly.

    Raises:
        ValueError: keys that the model does not have, keys that are missing, or other shapes; all of them are listed. (A
            non-strict load of this layout silently leaves the encoder random.)
    """
    used = {key: value for key, value in published.items() if not key.startswith(_UNUSED_HEADS)}
    return _convert(used, model, _rename_advcl, "AdvCL network")


def _rename_kuangliu(key: str) -> str:
    if key.startswith("linear."):
        return key.replace("linear.", "fc.", 1)
    return re.sub(r"^(layer\d+\.\d+)\.shortcut\.", r"\1.downsample.", key)


def convert_kuangliu(published: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Renames a checkpoint of the CIFAR ResNets of kuangliu/pytorch-cifar (`shortcut`, `linear`) to the keys of timm's class.

    The weights say nothing about the normalisation of the images: the caller knows what the published network takes.

    Args:
        published: the state dict itself, i.e. the entry `net` or `state_dict` where a checkpoint has one; a leading `module.`
            of every key is removed. PyTorch before 0.4.1 had no `num_batches_tracked`: when there are none at all, the model's
            own are taken, as PyTorch does. When only some are there, the others are missing.
        model: the network it is for: `resnet18_cifar`, `resnet34_cifar` or `resnet50_cifar` with the checkpoint's
            `num_classes`. For an encoder without head, call `reset_classifier(0)` after loading.

    Returns:
        A state dict that `model.load_state_dict` takes strictly.

    Raises:
        ValueError: keys that the model does not have, keys that are missing, or other shapes; all of them are listed.
    """
    counters: dict[str, Tensor] = {}
    if not any(key.endswith(_COUNTER) for key in published):
        counters = {key: value.clone() for key, value in model.state_dict().items() if key.endswith(_COUNTER)}
    return _convert(published, model, _rename_kuangliu, "CIFAR ResNet", counters)


def _convert(
    published: Mapping[str, Tensor],
    model: nn.Module,
    rename: Callable[[str], str],
    network: str,
    defaults: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Renames every key, and refuses what does not fit the model exactly; only the keys of `defaults` may be missing."""
    if published and all(key.startswith("module.") for key in published):
        published = {key.removeprefix("module."): value for key, value in published.items()}
    defaults = defaults or {}
    origin = {rename(key): key for key in published}
    expected = model.state_dict()
    problems = [f"unknown key {origin[k]}" for k in origin if k not in expected]
    problems += [f"missing key {k}" for k in expected if k not in origin and k not in defaults]
    # Of two spellings of one key, e.g. fc_2 and fc_002, the dict above keeps the last.
    problems += [f"{key} and {origin[rename(key)]} are one key" for key in published if origin[rename(key)] != key]
    problems += [
        f"shape of {origin[k]}: {tuple(published[origin[k]].shape)}, the model has {tuple(expected[k].shape)}"
        for k in origin
        if k in expected and published[origin[k]].shape != expected[k].shape
    ]
    if problems:
        raise ValueError(f"Not a checkpoint of this {network}:\n  " + "\n  ".join(problems))
    return {**defaults, **{renamed: published[key] for renamed, key in origin.items()}}
