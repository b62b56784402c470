"""From a recipe to a network, its optimizer and its learning-rate schedule."""

import copy
import difflib
import logging
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor, nn

import advcl_hub  # noqa: F401  (registers our architectures with timm)
from advcl_hub.errors import reason_of
from advcl_hub.pretraining import Method, create_method
from advcl_hub.training.layout import safe_channels_last
from train.recipe import Recipe, require
from train.start import Start, take_weights

log = logging.getLogger("advcl")
CPU = torch.device("cpu")


def build_encoder(recipe: Recipe, shape: tuple[int, int, int], start: Mapping[str, Any] | None = None) -> nn.Module:
    """The recipe's timm model without classifier and with new weights, for images of this shape (C, H, W).

    Its cfg asks for images in [0, 1] as they are, or normalised as the encoder was that the run starts from.

    Args:
        recipe: names the model and its arguments.
        shape: of an image.
        start: the facts of that encoder (`train.start.Start`), None if there is none.

    Raises:
        ValueError: timm does not know the model (near names are given), or it does not take these arguments or images.
    """
    name, known = recipe.model, timm.list_models()
    if name not in known:
        near = difflib.get_close_matches(name, known, 3)
        raise ValueError(f"timm has no model {name!r}." + (f" Did you mean {', '.join(near)}?" if near else ""))
    mean, std = (start["mean"], start["std"]) if start else ((0.0,) * shape[0], (1.0,) * shape[0])
    cfg = {"input_size": shape, "mean": tuple(mean), "std": tuple(std), "crop_pct": 1.0}
    try:
        encoder = timm.create_model(name, num_classes=0, pretrained_cfg_overlay=cfg, **recipe.model_kwargs)
        with torch.no_grad():
            features = encoder.eval()(torch.zeros(2, *shape))
    except TypeError as error:
        raise ValueError(f"{name} does not take model_kwargs {dict(recipe.model_kwargs)}: {error}.") from error
    except (AssertionError, RuntimeError, ValueError) as error:
        size = "x".join(map(str, shape))
        raise ValueError(
            f"{name} with {dict(recipe.model_kwargs)} does not take {size} images: {reason_of(error).rstrip('.')}. Set "
            "model_kwargs (img_size, patch_size, in_chans) or data.size."
        ) from error
    require(
        features.ndim == 2,
        f"{name} gives features of shape {tuple(features.shape)}; set model_kwargs.global_pool.",
    )
    return encoder.train()


def build_network(
    recipe: Recipe, shape: tuple[int, int, int], device: torch.device = CPU, start: Start | None = None
) -> Method:
    """The recipe's method with its encoder, seeded by the recipe, on its device.

    Args:
        recipe: what to train.
        shape: of an image (C, H, W).
        device: where.
        start: the encoder that the recipe starts from (`train.start.open_start`).

    Raises:
        ValueError, OSError: the encoder cannot be built, the weights do not fit it, or a projection head is missing.
    """
    if recipe.speed.sync_batch_norm:
        require(torch.cuda.is_available(), "speed.sync_batch_norm needs GPUs; set it to false.")
    torch.manual_seed(recipe.seed)
    encoder = build_encoder(recipe, shape, start.facts if start else None)
    if start:
        take_weights(encoder, start, shape)
    layout = torch.channels_last if recipe.speed.channels_last else torch.contiguous_format
    if recipe.speed.channels_last and not safe_channels_last(encoder, device):
        log.warning("%s is trained contiguous: channels-last would corrupt memory on a CPU (oneDNN issue 6035).", recipe.model)
        layout = torch.contiguous_format
    network = create_method(
        recipe.method,
        encoder,
        objective=recipe.objective,
        attack=recipe.attack,
        views=recipe.views,
        ks=recipe.pseudo_labels.ks,
        projector=start.projector if start else None,
        memory_format=layout,
    )
    if recipe.speed.sync_batch_norm:  # not before: only plain batch norms are folded for the attack
        network = timm.layers.convert_sync_batchnorm(network)
    return network.to(device).to(memory_format=layout)


def plain_encoder(
    recipe: Recipe, shape: tuple[int, int, int], state: Mapping[str, Tensor], provenance: Mapping[str, Any]
) -> nn.Module:
    """The stock timm model with one branch's weights (see `branch_state_dict`), in evaluation mode.

    Args:
        recipe: of the run.
        shape: of an image (C, H, W).
        state: the plain state dict.
        provenance: of the run, which knows how the encoder that it started from wants its images.
    """
    encoder = build_encoder(recipe, shape, provenance.get("start_from"))
    encoder.load_state_dict(state)
    return encoder.eval()


def compile_encoder(recipe: Recipe, network: Method, shape: tuple[int, int, int]) -> None:
    """Compiles the encoder and the networks beside it, in place: each branch and mode at its first pass, as one graph.

    Raises:
        ValueError: the model cannot be one graph.
    """
    torch._dynamo.config.cache_size_limit = 64  # one graph for every branch, mode and layout
    torch._dynamo.config.optimize_ddp = False  # would cut every graph at the gradient's buckets, the attack's too
    device = next(network.parameters()).device
    # Inductor would choose channels-last by itself.
    options = None if safe_channels_last(network.encoder, device) else {"layout_optimization": False}
    one_graph = not recipe.speed.sync_batch_norm  # PyTorch issue 161302: SyncBatchNorm breaks every graph
    if one_graph:
        trial = copy.deepcopy(network)
        trial.encoder.compile(fullgraph=True, backend="eager")
        try:
            trial.features(torch.zeros(2, *shape, device=device), trial.branch.names[0])
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = reason_of(error)
            raise ValueError(f"{recipe.model} cannot be compiled as one graph: {reason}; set speed.compile=false.") from error
        finally:
            torch._dynamo.reset()  # having seen two sizes of batches, it would compile for any
    for module in network.networks:
        module.compile(fullgraph=one_graph, options=options)


def build_optimizer(recipe: Recipe, network: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimizer over the parameters of a network that are trained."""
    c = recipe.optimizer
    return create_optimizer_v2(
        # Of a network timm makes two groups, of which one does not decay.
        [p for p in network.parameters() if p.requires_grad] if c.decay_norms_and_biases else network,
        "momentum" if c.name == "sgd" else c.name,  # timm's "sgd" is Nesterov's
        lr=c.lr,
        weight_decay=c.weight_decay,
        momentum=c.momentum,  # for optimizers that have one
    )


def build_schedule(recipe: Recipe, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> CosineLRScheduler:
    """Warm-up and cosine; a function of the step alone, so there is nothing to save."""
    c = recipe.optimizer
    return CosineLRScheduler(
        optimizer,
        t_initial=recipe.epochs * steps_per_epoch,
        lr_min=c.lr * c.min_lr_ratio,
        warmup_t=round(c.warmup_epochs * steps_per_epoch),
        warmup_lr_init=c.warmup_lr,
        t_in_epochs=False,
    )
