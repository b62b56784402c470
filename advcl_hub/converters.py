"""Strict conversion of encoders that others published: every key is accounted for, or nothing is loaded."""

import re
from collections.abc import Mapping

from torch import Tensor, nn

_ADVCL_BRANCHES = ("clean", "adv", "adv_ce")  # published as bn_list.0/1/2: normal, pgd, pgd_ce


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
        published: the checkpoint's state dict; a leading `module.` of every key is removed.
        model: the network it is for: `encoder` (resnet18_cifar with branches clean, adv, adv_ce), `projector` and `heads`.

    Returns:
        A state dict that `model.load_state_dict` takes strictly.

    Raises:
        ValueError: keys that the model does not have, keys that are missing, or other shapes; all of them are listed. (A
            non-strict load of this layout silently leaves the encoder random.)
    """
    if published and all(key.startswith("module.") for key in published):
        published = {key.removeprefix("module."): value for key, value in published.items()}
    origin = {_rename_advcl(key): key for key in published}
    expected = model.state_dict()
    problems = [f"unknown key {origin[k]}" for k in origin if k not in expected]
    problems += [f"missing key {k}" for k in expected if k not in origin]
    problems += [
        f"shape of {origin[k]}: {tuple(published[origin[k]].shape)}, the model has {tuple(expected[k].shape)}"
        for k in origin
        if k in expected and published[origin[k]].shape != expected[k].shape
    ]
    if problems:
        raise ValueError("Not a checkpoint of this AdvCL network:\n  " + "\n  ".join(problems))
    return {renamed: published[key] for renamed, key in origin.items()}
