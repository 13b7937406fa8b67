"""What a model's attention really does in a packed row, found out by trying it on a few random tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from oumi_pl.attention.blocks import packed
from oumi_pl.attention.interface import NAME, NO_PACKING
from oumi_pl.errors import UserError, is_out_of_memory, reason

TRIPPED = (TypeError, ValueError, KeyError, AttributeError, IndexError, NotImplementedError)
"""What architectures raise that take no `position_ids`, or make something of a mask of their own kind."""
SHAPES = ("shape", "size")
"""What torch says, in an error of no kind of its own, of tensors that don't fit together."""


def refuse_unless_isolating(model: nn.Module) -> None:
    """Refuses a model that lets packed documents see each other, found out by trying.

    Runs two documents of a few random tokens alone, packed, and packed with the first one changed, and compares hidden
    states. Leaves the random number generators and each module's training mode as they were.

    Args:
        model: a transformers model, with or without PEFT's layers; run as it will be in training, unsharded.

    Raises:
        UserError: a document's hidden states depend on its neighbours.
    """
    base = _base_model(model)
    first, second = _random_ids(base, 7, 6)
    changed = (first + 1) % len(_embedding(base))
    try:
        with _undisturbed(model):
            alone = _hidden_states(base, first), _hidden_states(base, second)
            together = _hidden_states(base, first, second)
            beside_another = _hidden_states(base, changed, second)[:, first.shape[1] :]
    except (*TRIPPED, RuntimeError) as error:
        if not _is_of_the_attention(error):
            raise
        told = f"the attention of {type(base).__name__} can't keep packed documents apart"
        raise UserError(f"{told} ({type(error).__name__}: {reason(error)}); {NO_PACKING}") from error
    off = max(_distance(together, torch.cat(alone, 1)), _distance(beside_another, alone[1]))
    if not off <= _tolerance(base):
        implementation = getattr(base.config, "_attn_implementation", None)
        others = f"set model.attn to {NAME!r} or 'flash_attention_2', or "
        remedy = ("" if implementation == NAME else others) + NO_PACKING
        raise UserError(
            f"{type(base).__name__} with the attention {implementation!r} lets packed documents see each other: "
            f"the hidden states of a document changed by {off:.1e} (relative) beside another one; {remedy}"
        )


def why_not_shared(model: nn.Module) -> str | None:
    """Tells why a model can't compute the prompt of a pair once for both responses; None if it can, exactly.

    Compares hidden states of two pairs laid out as prompt, chosen, rejected with those of the four sequences alone.
    Arguments and side effects as for `refuse_unless_isolating`.
    """
    base = _base_model(model)
    pair_lengths = [(5, 4, 6), (3, 7, 2)]
    pieces = _random_ids(base, *(n for lengths in pair_lengths for n in lengths))
    try:
        with _undisturbed(model):
            alone = []
            for prompt, chosen, rejected in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True):
                alone.append(_hidden_states(base, torch.cat([prompt, chosen], 1)))
                alone.append(_hidden_states(base, torch.cat([prompt, rejected], 1))[:, prompt.shape[1] :])
            ids = torch.cat(pieces, 1)
            positions = [p for n, c, r in pair_lengths for p in (*range(n + c), *range(n, n + r))]
            with packed(pair_lengths=pair_lengths):
                shared = _last(base, ids, torch.tensor([positions], device=ids.device))
    except (TypeError, UserError) as error:
        return str(error)
    off = _distance(shared, torch.cat(alone, 1))
    if off <= _tolerance(base):
        return None
    return f"{type(base).__name__} mixes responses that share a prompt (hidden states off by {off:.1e}, relative)"


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluates without gradients, and leaves the generators and each module's training mode as they were."""
    weight = _embedding(_base_model(model))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([weight.device] if weight.is_cuda else []):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _base_model(model: nn.Module) -> Any:
    unwrap = getattr(model, "get_base_model", None)  # PEFT's
    model = unwrap() if callable(unwrap) else model
    return getattr(model, "base_model", model)


def _embedding(base: Any) -> Tensor:
    return base.get_input_embeddings().weight


def _tolerance(base: Any) -> float:
    return 1e-4 if _embedding(base).dtype in (torch.float32, torch.float64) else 3e-2


def _random_ids(base: Any, *lengths: int) -> list[Tensor]:
    """Random tokens, `[1, length]` each."""
    weight, generator = _embedding(base), torch.Generator().manual_seed(0)
    return [torch.randint(len(weight), (1, n), generator=generator).to(weight.device) for n in lengths]


def _hidden_states(base: Any, *documents: Tensor) -> Tensor:
    """Runs documents `[1, length]` packed and returns the last hidden states, `[1, seq, hidden]`."""
    ids = torch.cat(documents, 1)
    lengths = [document.shape[1] for document in documents]
    positions = torch.cat([torch.arange(length, device=ids.device) for length in lengths])[None]
    with packed(lengths):
        return _last(base, ids, positions)


def _is_of_the_attention(error: Exception) -> bool:
    if is_out_of_memory(error):
        return False
    return isinstance(error, TRIPPED) or any(word in str(error) for word in SHAPES)


def _last(base: Any, ids: Tensor, positions: Tensor) -> Tensor:
    output = base(input_ids=ids, position_ids=positions, use_cache=False)
    if not hasattr(output, "last_hidden_state"):
        raise UserError(f"{type(base).__name__} returns no hidden states: its documents can't be packed; {NO_PACKING}")
    return output.last_hidden_state


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).float().norm() / b.float().norm())
