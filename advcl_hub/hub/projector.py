"""The projection head of pretraining, which an export can carry beside the encoder.

Contrastive pretraining compares images behind this head, and finetuning drops it. Who goes on pretraining, distils the encoder
or compares its projections needs it:

    projector = load_projector("hf-hub:ORG/NAME")
    projections = projector(encoder(images))
"""

import warnings
from pathlib import Path

import torch
from torch import nn

from advcl_hub.hub.projector_file import PROJECTOR, projector_from_state, read_projector
from advcl_hub.hub.registry import find_release, is_model_folder, open_source
from advcl_hub.modes import as_usual

__all__ = ["PROJECTOR", "load_projector", "projector_from_state"]


@as_usual()
def load_projector(source: str | Path) -> nn.Sequential:
    """The projection head of an export, in evaluation mode, float32, on the CPU.

    A folder is verified first (`advcl_hub.hub.export.verify_folder`). The file is compared with the sha256 in results.json;
    there is a warning where nothing tells one.

    Args:
        source: an exported folder, also as `local-dir:FOLDER`, `hf-hub:ORG/NAME[@REVISION]`, or the name of registered weights.

    Raises:
        FileNotFoundError: it was exported without its projection head, or there is no such folder.
        ValueError: the file is damaged, or is no projection head.
        OSError: the Hub cannot be reached, or has no such repository.
    """
    release = None if is_model_folder(Path(source)) else find_release(str(source))
    if release is None:
        with torch.random.fork_rng(devices=[]):  # to verify a folder is to make its model, with random weights at first
            release = open_source(source)
    missing = f"{source} has no {PROJECTOR}: export the encoder again with --keep-projector."
    if release.files:
        if PROJECTOR not in release.files:
            raise FileNotFoundError(missing)
        return read_projector(release.fetch(PROJECTOR))
    try:
        path = release.fetch(PROJECTOR)
    except FileNotFoundError as error:
        raise FileNotFoundError(missing) from error
    warnings.warn(f"{release.unchecked or f'{source} tells no sha256'}: {PROJECTOR} is not checked.", stacklevel=3)
    return read_projector(path)
