"""Tests what a model's attention does in a packed row, by running the model on a few random tokens."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from oumi_pl.attention.interface import NAME, NO_PACKING
from oumi_pl.attention.rotary import depends_on_length
from oumi_pl.attention.segments import packed, path_positions, position_ids
from oumi_pl.errors import UserError, is_out_of_memory, reason
from oumi_pl.types import Segment

ATTENTION_ERRORS = (TypeError, ValueError, KeyError, AttributeError, IndexError, NotImplementedError)
"""Raised by architectures that take no `position_ids`, or compute with the mask, which here is a `Blocks`."""
SHAPE_WORDS = ("shape", "size")
"""Words in torch's plain RuntimeErrors about tensors whose shapes don't match."""
FOREST = (
    Segment(9),
    Segment(6, parent=0, shared=5),
    Segment(4, parent=0, shared=9),
    Segment(3, parent=1, shared=8),
    Segment(5, parent=1, shared=3),  # its prefix ends inside its grandparent
    Segment(7),
    Segment(4, parent=5, shared=2),
    Segment(2, parent=3, shared=7),  # likewise; and its tree is not contiguous in the row
)
"""The segments that `why_not_shared` runs: two trees, up to four segments deep."""


LENGTH_WORDS = ("window", "chunk", "floor_scale", "topk")
"""Parts of the names of config values that are numbers of tokens after which a model behaves in another way."""


def changes(model: nn.Module, longest: int) -> list[int]:
    """Lengths below `longest` at which the config says that a model behaves in another way, ascending."""
    config = body_of(model).config.get_text_config()
    values = {v for k, v in config.to_dict().items() if isinstance(v, int) and any(word in k for word in LENGTH_WORDS)}
    rotary = [module for module in body_of(model).modules() if depends_on_length(module)]
    for module in rotary:
        rope = config.rope_parameters or {}
        nested = [rope, *(part for part in rope.values() if isinstance(part, dict))]
        values |= {part.get("original_max_position_embeddings") or module.original_max_seq_len for part in nested}
    return sorted(value for value in values if 7 < value < longest)


def refuse_unless_isolating(model: nn.Module, longest: int = 0) -> None:
    """Refuses a model that lets packed documents see each other.

    Runs two documents of a few random tokens alone, packed, and packed with the first one changed, and compares hidden
    states; and again with a first document that is longer than each of `changes`. Leaves the random number generators
    and each module's training mode as they were.

    Args:
        model: a transformers model, with or without PEFT's layers; run as it will be in training, unsharded.
        longest: tokens of the longest row in training.

    Raises:
        UserError: a document's hidden states depend on its neighbours.
    """
    for length in (7, *(change + 3 for change in changes(model, longest))):
        _refuse_unless_isolated(model, [Segment(length), Segment(6)])


def _refuse_unless_isolated(model: nn.Module, documents: Sequence[Segment]) -> None:
    base = body_of(model)
    lengths = [document.length for document in documents]
    first, second = _random_ids(base, sum(lengths)).split(lengths, 1)
    changed = (first + 1) % len(_embedding(base))
    try:
        with probing(model, _embedding(base).device):
            alone = _hidden_states(base, first, documents[:1]), _hidden_states(base, second, documents[1:])
            together = _hidden_states(base, torch.cat([first, second], 1), documents)
            beside_another = _hidden_states(base, torch.cat([changed, second], 1), documents)[:, lengths[0] :]
    except (*ATTENTION_ERRORS, RuntimeError) as error:
        if not _is_attention_error(error):
            raise
        raise UserError(
            f"the attention of {type(base).__name__} can't keep packed documents apart "
            f"({type(error).__name__}: {reason(error)}); {NO_PACKING}"
        ) from error
    off = max(_distance(together, torch.cat(alone, 1)), _distance(beside_another, alone[1]))
    if not off <= _tolerance(base):
        implementation = getattr(base.config, "_attn_implementation", None)
        others = f"set model.attn to {NAME!r} or 'flash_attention_2', or "
        remedy = ("" if implementation == NAME else others) + NO_PACKING
        raise UserError(
            f"{type(base).__name__} with the attention {implementation!r} lets packed documents see each other: "
            f"the hidden states of a document changed by {off:.1e} (relative) beside another one; {remedy}"
        )


def why_not_isolating(model: nn.Module, longest: int = 0) -> str | None:
    """The message of `refuse_unless_isolating`; None if the model keeps packed documents apart."""
    try:
        refuse_unless_isolating(model, longest)
    except UserError as error:
        return str(error)
    return None


def why_not_shared(model: nn.Module) -> str | None:
    """The reason why a model can't compute shared tokens only once; None if it can do so exactly.

    Compares the hidden states of each segment of a small forest with those of its path run alone. The argument is that
    of `refuse_unless_isolating`.
    """
    base = body_of(model)
    positions = position_ids(FOREST)
    ids = _random_ids(base, len(positions))
    try:
        with probing(model, _embedding(base).device):
            together = _hidden_states(base, ids, FOREST).split([segment.length for segment in FOREST], 1)
            distances = []
            for i, segment in enumerate(FOREST):
                path = path_positions(FOREST, i)
                alone = _hidden_states(base, ids[:, path], [Segment(len(path))])
                distances.append(_distance(together[i], alone[:, segment.shared :]))
    except UserError as error:
        return str(error)
    except (*ATTENTION_ERRORS, RuntimeError) as error:
        if not _is_attention_error(error):
            raise
        return f"the attention of {type(base).__name__} can't share tokens ({type(error).__name__}: {reason(error)})"
    if all(distance <= _tolerance(base) for distance in distances):
        return None
    off = max(distances)
    return f"{type(base).__name__} mixes responses that share a prompt (hidden states off by {off:.1e}, relative)"


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode, and gives each module its own mode back at the end."""
    modes = {module: module.training for module in model.modules()}  # `train()` would switch frozen parts on as well
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def probing(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluates without gradients; restores the random number generators and each module's training mode."""
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []), evaluating(model):
        yield


def body_of(model: nn.Module) -> Any:
    """The part of a transformers model, with or without PEFT's layers, that returns hidden states.

    That is its `base_model`, except for architectures whose prefix names a part they don't have (Llama 4).
    """
    unwrap = getattr(model, "get_base_model", None)  # PEFT's
    bare: Any = unwrap() if callable(unwrap) else model
    body = getattr(bare, "base_model", bare)
    is_whole = body is bare and body.get_output_embeddings() is not None
    return getattr(body, "model", body) if is_whole else body


def _embedding(base: Any) -> Tensor:
    return base.get_input_embeddings().weight


def _tolerance(base: Any) -> float:
    return 1e-4 if _embedding(base).dtype in (torch.float32, torch.float64) else 3e-2


def _random_ids(base: Any, length: int) -> Tensor:
    """Random tokens, `[1, length]`."""
    weight, generator = _embedding(base), torch.Generator().manual_seed(0)
    return torch.randint(len(weight), (1, length), generator=generator).to(weight.device)


def _hidden_states(base: Any, ids: Tensor, segments: Sequence[Segment]) -> Tensor:
    """Runs a packed row `[1, seq]` and returns the last hidden states, `[1, seq, hidden]`."""
    positions = torch.from_numpy(position_ids(segments)).to(ids.device)[None]
    with packed(segments):
        output = base(input_ids=ids, position_ids=positions, use_cache=False)
    if not hasattr(output, "last_hidden_state"):
        raise UserError(f"{type(base).__name__} returns no hidden states: its documents can't be packed; {NO_PACKING}")
    return output.last_hidden_state


def _is_attention_error(error: Exception) -> bool:
    if is_out_of_memory(error):
        return False
    return isinstance(error, ATTENTION_ERRORS) or any(word in str(error) for word in SHAPE_WORDS)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).float().norm() / b.float().norm())
