"""Parameter groups, and fused optimizer steps."""

from collections.abc import Callable, Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.optim import Adam, AdamW, Optimizer

from oumi_pl.errors import UserError, nearest


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    embeddings: Collection[nn.Parameter] = (),
    *,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    factor: Callable[[str, nn.Parameter], float] = lambda name, parameter: 1.0,
    frozen: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Splits the trainable parameters into `matrices`, `embeddings` and `no_decay` (biases, norms).

    Weight decay on a norm's scale or a bias does not regularise. `matrices` is a separate group because optimizers like
    Muon are for the weights of layers, not for embeddings with a row per token.

    Args:
        named: The parameters with their names.
        embeddings: The parameters of embeddings and of the head.
        settings: Names of modules or parameters, with `*` for any text -> settings of their groups. Of several names
            that match, the last one applies. `lr_factor` multiplies the learning rate.
        factor: Name and parameter -> factor on the learning rate, in addition.
        frozen: Names of modules whose parameters are in a group although they are not trained now.

    Returns:
        Groups with `params`, `name` (`matrices`, or `matrices: lm_head, x0.9` if it is divided further), their
        settings, and `lr_factor` if it is not 1.

    Raises:
        UserError: a name matches nothing.
    """
    vocabulary = {id(parameter) for parameter in embeddings}
    groups: dict[str, dict[str, Any]] = {}
    parameters = list(named)
    refuse_unknown_modules("model.groups", settings or {}, [name for name, _ in parameters])
    for kind in ("matrices", "embeddings", "no_decay"):
        for name, parameter in parameters:
            if not (parameter.requires_grad or any(belongs(name, module) for module in frozen)):
                continue
            own = "no_decay" if parameter.ndim < 2 else "embeddings" if id(parameter) in vocabulary else "matrices"
            if own != kind:
                continue
            match = next((pattern for pattern in reversed(list(settings or {})) if belongs(name, pattern)), None)
            values = ({"weight_decay": 0.0} if kind == "no_decay" else {}) | dict((settings or {}).get(match or "", {}))
            if (scale := factor(name, parameter) * values.pop("lr_factor", 1.0)) != 1.0:
                values["lr_factor"] = scale
            parts = ", ".join([*([match] if match else []), *([f"x{scale:.4g}"] if scale != 1.0 else [])])
            label = f"{kind}: {parts}" if parts else kind
            groups.setdefault(label, {"params": [], "name": label} | values)["params"].append(parameter)
    return list(groups.values())


def belongs(name: str, module: str) -> bool:
    """Whether a parameter is the one of this name, or in the module of this name; `*` stands for any text."""
    return fnmatchcase(name, module) or fnmatchcase(name, f"{module}.*")


def refuse_unknown_modules(key: str, modules: Iterable[str], names: Collection[str]) -> None:
    """Refuses names of modules to which none of the parameters belongs.

    Raises:
        UserError: for the first one.
    """
    for module in modules:
        if not any(belongs(name, module) for name in names):
            known = {name.rsplit(".", n)[0] for name in names for n in range(1, name.count(".") + 1)}
            raise UserError(f"{key}: the model has no module or parameter {module!r}{nearest(module, known)}")


def is_of(group: Mapping[str, Any], kind: str) -> bool:
    """Whether a group is `matrices`, `embeddings` or `no_decay`, or a part of it."""
    return str(group.get("name", "")).partition(":")[0] == kind


def scale_rates(optimizer: Optimizer) -> None:
    """Multiplies the learning rate of each group by its `lr_factor`. Call it once, before a schedule is created."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * group.get("lr_factor", 1.0)


def fuse(optimizer: Optimizer) -> None:
    """Switches on the fused step of Adam and AdamW, unless the recipe sets `fused` or `foreach`."""
    undecided = all(group.get("fused") is None and group.get("foreach") is None for group in optimizer.param_groups)
    if isinstance(optimizer, Adam | AdamW) and undecided:
        for group in optimizer.param_groups:
            group["fused"] = True
