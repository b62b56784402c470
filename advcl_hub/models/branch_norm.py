"""Named batch-norm branches for any timm model.

Clean and adversarial images have different activation statistics, so AdvCL (section 4) normalises each kind with batch norms of
its own: every `BatchNorm` becomes a set of copies, one a branch, and one switch chooses the branch for the whole network.

    switch = add_branches(encoder, ("clean", "adv"))
    with switch.use("adv"):
        features = encoder(adversarial)
    plain = without_branches(encoder, "adv")                   # the timm model that it came from, with trained weights
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_BRANCH_KEY = re.compile(r"^(?P<norm>.+)\.bn_branches\.(?P<branch>[^.]+)\.(?P<leaf>.+)$")


class BranchSwitch:
    """The branch that all `BranchNorm` layers of one network use; the first name is active at the start."""

    def __init__(self, names: Sequence[str]) -> None:
        if not names or len(set(names)) != len(names) or any(not n.isidentifier() for n in names):
            raise ValueError(f"Branch names must be distinct identifiers, at least one; got {list(names)}.")
        self.names = tuple(names)
        self.active = self.names[0]

    def select(self, name: str) -> None:
        """Makes `name` the active branch. Raises ValueError for an unknown name."""
        if name not in self.names:
            raise ValueError(f"No batch-norm branch {name!r}; this network has {list(self.names)}.")
        self.active = name

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Makes `name` active inside a `with` block and restores the earlier branch after it."""
        previous = self.active
        self.select(name)
        try:
            yield
        finally:
            self.active = previous


class BranchNorm(nn.Module):
    """Copies of one batch norm, of which a forward pass uses the one that the shared switch names."""

    def __init__(self, norm: nn.Module, switch: BranchSwitch) -> None:
        super().__init__()
        self.bn_branches = nn.ModuleDict({name: copy.deepcopy(norm) for name in switch.names})
        self.switch = switch

    def forward(self, x: Tensor) -> Tensor:
        return self.bn_branches[self.switch.active](x)


def add_branches(model: nn.Module, names: Sequence[str]) -> BranchSwitch:
    """Gives every batch norm of `model` one branch a name, in place. Each branch starts as a copy of the original.

    Covers BatchNorm1d/2d/3d, timm's BatchNormAct2d and both SyncBatchNorms; a model without batch norm is left as it is and
    gets a switch that changes nothing. Convert to SyncBatchNorm before or after this call.

    Args:
        model: any network, its batch norms below the top level.
        names: names of the branches.

    Returns:
        The switch shared by all branches of the model (a deep copy of the model has a switch of its own).

    Raises:
        ValueError: gradient checkpointing is on, or the model has branches already. Checkpointing recomputes the forward pass
            during backward, when the switch may stand elsewhere: it would silently use the wrong branch.
    """
    switch = BranchSwitch(names)
    if any(isinstance(m, BranchNorm) for m in model.modules()):
        raise ValueError("The model has batch-norm branches already; build a fresh one with timm.create_model.")
    norms = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, _BatchNorm)}
    if "" in norms:
        raise ValueError("The model is itself a batch norm: wrap it in a network.")
    if not norms:
        return switch
    if any(getattr(m, "grad_checkpointing", False) for m in model.modules()):
        raise ValueError(f"{_NO_CHECKPOINTING} Call model.set_grad_checkpointing(False) first.")
    for module in model.modules():  # all of them: a wrapper would call that of the model inside
        if hasattr(module, "set_grad_checkpointing"):
            module.set_grad_checkpointing = _refuse_checkpointing  # type: ignore[assignment]
    branched: dict[nn.Module, BranchNorm] = {}  # a norm that is used in two places stays one norm
    for name, norm in norms.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, branched.setdefault(norm, BranchNorm(norm, switch)))
    return switch


def without_branches(model: nn.Module, branch: str) -> nn.Module:
    """Returns a copy of the network with plain batch norms, those of one branch.

    Raises:
        ValueError: the network has branches, but none of this name.
    """
    plain = copy.deepcopy(model)
    for parent in list(plain.modules()):
        vars(parent).pop("set_grad_checkpointing", None)  # which `add_branches` has put before the class's own
        for leaf, child in list(parent.named_children()):
            if isinstance(child, BranchNorm):
                if branch not in child.bn_branches:
                    raise ValueError(f"No batch-norm branch {branch!r} in this network; it has {list(child.bn_branches)}.")
                setattr(parent, leaf, child.bn_branches[branch])
    return plain


def branch_state_dict(state: Mapping[str, Tensor], branch: str) -> dict[str, Tensor]:
    """The plain timm state dict of one branch: `x.bn_branches.{branch}.leaf` becomes `x.leaf`, all else stays.

    Raises:
        ValueError: the state has branches, but none of this name.
    """
    plain: dict[str, Tensor] = {}
    present: set[str] = set()
    for key, value in state.items():
        match = _BRANCH_KEY.match(key)
        if match is None:
            plain[key] = value
        else:
            present.add(match["branch"])
            if match["branch"] == branch:
                plain[f"{match['norm']}.{match['leaf']}"] = value
    if present and branch not in present:
        raise ValueError(f"No batch-norm branch {branch!r} in these weights; they have {sorted(present)}.")
    return plain


_NO_CHECKPOINTING = "Gradient checkpointing and batch-norm branches cannot be used together."


def _refuse_checkpointing(enable: bool = True) -> None:
    if enable:
        raise ValueError(f"{_NO_CHECKPOINTING} Use a smaller batch, or a model without batch norm.")
