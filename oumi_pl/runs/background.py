"""Copies a checkpoint to host memory, and does work in a thread while training goes on."""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


@torch.inference_mode(False)  # a validation may be under way, and what it creates can't be used in another thread
@torch.no_grad()
def snapshot(content: Any) -> Any:
    """Copies a checkpoint, so that what changes afterwards does not change the copy.

    A file of the copy has the bytes that a file of the original would have: tensors that share memory share it in the
    copy as well.

    Args:
        content: Nested dictionaries, lists and tuples of tensors and plain values.

    Returns:
        The same structure, all of it in host memory. Shards of other ranks are not gathered.
    """
    copies: dict[int, Any] = {}
    storages: dict[int, torch.UntypedStorage] = {}
    for tensor in _tensors(content):
        if id(tensor) not in copies:
            copies[id(tensor)] = _on_host(tensor, storages)
    return copy.deepcopy(content, copies)


def _tensors(content: Any) -> Iterator[Any]:
    if type(content) is Tensor or is_traceable_wrapper_subclass(content):
        yield content
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from _tensors(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _tensors(value)


def _on_host(tensor: Any, storages: dict[int, torch.UntypedStorage]) -> Tensor:
    """Copies a tensor, or the tensors that a sharded or quantized one wraps; each storage once."""
    if is_traceable_wrapper_subclass(tensor):
        names, context = tensor.__tensor_flatten__()
        # among them may be a mesh of ranks, which stays the same
        parts = {name: getattr(tensor, name) for name in names}
        parts = {n: _on_host(part, storages) if isinstance(part, Tensor) else part for n, part in parts.items()}
        return type(tensor).__tensor_unflatten__(parts, context, tensor.shape, tensor.stride())
    if tensor.layout != torch.strided or tensor.is_quantized:
        return tensor.detach().clone().cpu()
    original = tensor.untyped_storage()
    if original._cdata not in storages:
        storages[original._cdata] = original.clone() if original.device.type == "cpu" else original.cpu()
    empty = torch.empty(0, dtype=tensor.dtype)
    return empty.set_(storages[original._cdata], tensor.storage_offset(), tensor.shape, tensor.stride())


class Background:
    """Does work in a thread, one piece after another; none after one that failed."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Starts a piece of work once those before it are done."""
        self._thread = threading.Thread(
            target=self._run,
            args=(work, self._thread),
            name="oumi_pl-background",
            # a process must be able to end while another rank, with which this thread would have to agree, is gone
            daemon=True,
        )
        self._thread.start()

    def _run(self, work: Callable[[], None], before: threading.Thread | None) -> None:
        if before is not None:
            before.join()
        if self._error is None:
            try:
                work()
            except BaseException as error:  # the thread that waits raises it
                self._error = error

    def raise_error(self) -> None:
        """Raises the error of a piece of work that failed, once."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Waits until everything is done, and raises the error of what failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.raise_error()
