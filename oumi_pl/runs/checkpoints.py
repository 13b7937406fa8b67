"""Writes checkpoints atomically, so that a kill at any moment leaves a complete one; reads the state of generators."""

import importlib
import pickle
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor, nn
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from oumi_pl.errors import UserError
from oumi_pl.runs.checksums import refuse_damaged
from oumi_pl.runs.files import HALF, put
from oumi_pl.runs.received import refuse_code

META = "meta.pt"
"""File of a sharded checkpoint, which is a directory, for all but weights and optimizers."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file in the same folder, syncs it to disk, and renames it.

    Lightning's own class serializes in memory and moves the file from the system's temporary directory. Across file
    systems that is a copy, which a kill can cut short.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Saves to a local path atomically; removes the temporary file if writing fails."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_name(path.name + HALF)
        try:
            with half.open("wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            half.unlink(missing_ok=True)
            # after a failed write, torch's writer fails again on closing the file, with an error that hides the cause
            full = error if isinstance(error, OSError) else error.__context__
            if isinstance(full, OSError):
                full.filename = full.filename or str(path)
            raise
        put(half, path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Loads tensors and plain containers only, since other pickles can run code, unless `weights_only` is False.

        Raises:
            UserError: if the file is not a checkpoint, or damaged.
        """
        # a spawned process returns its weights to Lightning in a file of this name, without a dictionary around them
        is_handover = Path(path).name == ".temp.ckpt"
        if not is_handover and Path(path).exists():
            refuse_damaged(Path(path))
        try:
            if is_sharded_checkpoint(Path(path)):
                return read_sharded(Path(path))
            if weights_only is False:
                content = super().load_checkpoint(path, map_location, weights_only=False)
            else:
                content = read_tensors(path, map_location)
        except UserError:
            raise
        except Exception as error:  # any error of torch's is about this file
            raise UserError(f"{path}: can't be read as a checkpoint: {str(error).partition(chr(10))[0]}") from error
        if not is_handover and (not isinstance(content, dict) or "state_dict" not in content):
            raise UserError(f"{path}: is not a checkpoint of a run (it has no state_dict)")
        return content


def read_tensors(path: Path | str, map_location: Any = "cpu", mmap: bool = False) -> Any:
    """Reads a file of tensors and plain containers, without running code from it.

    torchao's quantized states of optimizers are tensors, too, and torch knows them once they are imported.

    Raises:
        UserError: the file has such states, and torchao is not installed.
    """
    try:
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        if "torchao.optim." not in str(error):
            raise
        try:
            importlib.import_module("torchao.optim")
        except ImportError as missing:
            raise UserError(f"{path}: its optimizer is one of torchao: pip install 'oumi_pl[low-bit]'") from missing
    return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)


def is_sharded_checkpoint(path: Path) -> bool:
    """Whether a path is a checkpoint that FSDP2 wrote as a directory, a file for each rank."""
    return (path / META).is_file()


def read_sharded(path: Path, optimizers: bool = True) -> dict[str, Any]:
    """Reads a sharded checkpoint whole, in this process alone, without running code from it.

    Args:
        path: The directory.
        optimizers: Whether to read the state of optimizers.

    Returns:
        What a checkpoint in one file would hold; the state of optimizers is by the names of weights.
    """
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    class Planner(_EmptyStateDictLoadPlanner):
        """Creates the tensors that the checkpoint describes."""

        def load_bytes(self, read_item: Any, value: Any) -> None:
            """As of its base class, which would run code from pickles."""
            name = read_item.dest_index.fqn
            set_element(self.original_state_dict, self.mappings[name], torch.load(value, weights_only=True))

    refuse_damaged(path)
    refuse_code(path)
    content = torch.load(path / META, map_location="cpu", weights_only=True)
    shards: dict[str, Any] = {}
    planner = Planner(keys=None if optimizers else {"state_dict"})
    with warnings.catch_warnings(action="ignore"):  # about loading in a single process, which is intended
        _load_state_dict(shards, storage_reader=FileSystemReader(path), planner=planner, no_dist=True)
    content["state_dict"] = shards.pop("state_dict")
    if shards:
        content["optimizer_states"] = [shards[name] for name in sorted(shards)]  # optimizer_0, ...
    return content


def read_unsharded(path: Path) -> dict[str, Any]:
    """Reads a file, mapped to memory, or what a folder of shards holds besides weights and optimizers."""
    file = path / META if path.is_dir() else path
    return read_tensors(file, mmap=True)


def weight_names(path: Path) -> set[str]:
    """The names of the weights in a checkpoint."""
    if not is_sharded_checkpoint(path):
        return {*read_unsharded(path)["state_dict"]}
    return {name.removeprefix("state_dict.") for name in _shards(path) if name.startswith("state_dict.")}


def _shards(path: Path) -> dict[str, Any]:
    """What the files of a sharded checkpoint hold, by key."""
    from torch.distributed.checkpoint import FileSystemReader

    refuse_code(path)
    return FileSystemReader(path).read_metadata().state_dict_metadata


def sharded_optimizer_state(path: Path, number: int, module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Reads the state of an optimizer of sharded weights; all ranks have to call this.

    Args:
        path: A checkpoint in one file or in shards.
        number: Of the optimizer in the run.
        module: Holds the weights.
        optimizer: Gets a state of zeros for all that is trained.

    Returns:
        The state by the names of weights, without those that the checkpoint or the optimizer doesn't have.
    """
    from torch.distributed.checkpoint import load
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    own: dict[str, Any] = get_optimizer_state_dict(module, optimizer)
    if not is_sharded_checkpoint(path):
        saved = read_unsharded(path)["optimizer_states"][number]
        known = {name: values for name, values in saved["state"].items() if name in own["state"]}
        return saved | {
            "state": {
                name: {key: as_kept(value, own["state"][name].get(key)) for key, value in values.items()}
                for name, values in known.items()
            }
        }
    optimizer_key = f"optimizer_{number}"
    keys = _shards(path)
    own["state"] = {
        name: values
        for name, values in own["state"].items()
        if any(f"{optimizer_key}.state.{name}.{key}" in keys for key in values)
    }
    if not own["state"]:
        del own["state"]
    parts = {optimizer_key: own}
    load(parts, checkpoint_id=path)
    return {"state": {}} | parts[optimizer_key]


def in_own_form(saved: dict[str, Any], module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The state of an optimizer as it keeps it: in 8 bits, for those of torchao, of which shards are read as floats.

    Args:
        saved: The state by the names of weights.
        module: Holds the weights, which are not sharded.
        optimizer: One of torchao gets a state of zeros for all that is trained.
    """
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    if not type(optimizer).__module__.startswith("torchao."):
        return saved
    own: dict[str, Any] = get_optimizer_state_dict(module, optimizer)["state"]  # type: ignore[assignment]
    state = {
        name: {key: as_kept(value, own.get(name, {}).get(key)) for key, value in values.items()}
        for name, values in saved["state"].items()
    }
    return saved | {"state": state}


def as_kept(value: Any, like: Any) -> Any:
    """A whole value of a saved state, in the form in which an optimizer keeps it; all ranks have to call this.

    Args:
        value: As it was saved.
        like: The optimizer's own one, which is overwritten if it is quantized; None if it has none.
    """
    local: Any = like.to_local() if isinstance(like, DTensor) else like
    if not isinstance(value, Tensor) or local is None or type(value) is type(local) is Tensor:
        return sharded_as(value, like)
    if type(value) is type(like):
        return value
    floats = sharded_as(value if type(value) is Tensor else value.dequantize(), like)
    floats = floats.to_local() if isinstance(floats, DTensor) else floats
    local.copy_(floats)
    if type(local) is not Tensor:
        # the codes of torchao reach from -0.993 to 1: blocks whose largest value is negative would shrink each time
        lost = _largest(floats, local.block_size) / _largest(local.dequantize(), local.block_size)
        local.scale.mul_(lost.nan_to_num(1.0))
    return like


def _largest(values: Tensor, block_size: int) -> Tensor:
    """The largest absolute value of each block, `[blocks]`."""
    return values.abs().view(-1, block_size).amax(-1)


def sharded_as(value: Any, like: Any) -> Any:
    """A whole tensor, sharded as `like` is; all ranks have to call this. Returns other values as they are."""
    if isinstance(value, DTensor) or not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


WEIGHTS_ONLY = (
    "this checkpoint holds weights only (a best.ckpt): resume from a step-*.ckpt, or export it and start a new "
    "run from that model"
)
"""The error for a checkpoint that training can't go on from."""


def holds_weights_only(path: Path) -> bool:
    """Whether a checkpoint of a run has no state of optimizers, so that training can't go on from it."""
    if not is_sharded_checkpoint(path):
        content = read_unsharded(path)
        return "loops" in content and "optimizer_states" not in content
    return not any(name.startswith("optimizer_") for name in _shards(path))


def saved_at(path: Path) -> int:
    """The step at which a checkpoint was saved."""
    return int(read_unsharded(path)["global_step"])


def rng_state() -> dict[str, Any]:
    """The state of all random generators that training may use, as plain values that load with `weights_only=True`."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    return {
        "python": [version, list(internal), gauss_next],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restores the state of all random generators."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
