"""Wraps any `nn.Module` from token ids to logits (a "plain module") as a causal LM of transformers."""

import copy
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from oumi_pl.attention.probe import probing
from oumi_pl.errors import UserError, reason

DESCRIPTION = "module_config.json"
"""File in the folder of an exported module: its class and constructor arguments."""
PROBE_TOKENS = 8
"""Number of tokens on which a module is checked before training."""
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Largest difference between two computations of the same logits, relative to the largest logit, by dtype."""
HALF = 5e-2
"""The same for all other dtypes (float16, bfloat16)."""


class PlainConfig(PretrainedConfig):
    """The config of a plain module; holds its vocabulary size."""

    model_type = "plain_module"

    def __init__(self, vocab_size: int = 1, **kwargs: Any) -> None:
        self.vocab_size = vocab_size
        super().__init__(**({"tie_word_embeddings": False, "use_cache": False} | kwargs))


class PlainBody(PreTrainedModel):
    """A plain module without its head: returns hidden states `[batch, seq, hidden]`."""

    config_class = PlainConfig

    def __init__(self, config: PlainConfig, module: nn.Module) -> None:
        super().__init__(config)
        self.all_tied_weights_keys: dict[str, str] = {}
        self.plain = module
        self.embedding_name: str = ""
        self.head_name: str | None = None
        """Names of the embedding and of the head in the module. Without a head, logits serve as hidden states."""
        self.takes, self.required = _parameters(module)

    def get_input_embeddings(self) -> nn.Module:
        """Returns the embedding of the token ids."""
        return self.plain.get_submodule(self.embedding_name)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None, **_: Any
    ) -> BaseModelOutput:
        """Runs the module without its head."""
        with _without(self.plain, self.head_name):
            return BaseModelOutput(self.output(input_ids, position_ids, attention_mask))

    def output(self, ids: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Calls the module on ids `[batch, seq]`, with positions and mask `[batch, seq]` if its `forward` takes them.

        Returns:
            `[batch, seq, vocab]` logits; hidden states while the head is replaced.

        Raises:
            UserError: its position embeddings are too short for these ids.
        """
        named: dict[str, Tensor] = {}
        if "position_ids" in self.takes:
            default = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
            named["position_ids"] = default if positions is None else positions
        if "attention_mask" in self.takes and (mask is not None or "attention_mask" in self.required):
            named["attention_mask"] = torch.ones_like(ids) if mask is None else mask
        try:
            return logits_of(self.plain(ids, **named))
        except IndexError as error:
            raise UserError(
                f"model: {type(self.plain).__name__} fails on a row of {ids.shape[1]} tokens ({reason(error)}); if "
                "its positions end there, set data.max_length to as many as it has"
            ) from error


class PlainLM(PreTrainedModel, GenerationMixin):
    """A causal LM of transformers around a plain module. The module, `plain`, is trained in place."""

    config_class = PlainConfig
    base_model_prefix = "body"

    def __init__(self, module: nn.Module) -> None:
        """Wraps a module. Runs it on a few token ids to find its embedding and head, and to check that it is causal.

        Raises:
            UserError: the module isn't a causal language model.
        """
        embedding, vocabulary = _embedding_and_vocabulary(module)
        config = PlainConfig(vocab_size=vocabulary)
        super().__init__(config)
        self.all_tied_weights_keys: dict[str, str] = {}
        self.body = PlainBody(config, module)
        self.body.embedding_name = embedding
        self.generation_config.use_cache = False
        self._whole = nn.Identity()
        with probing(module, self._embedding_weight.device):
            self._refuse_unless_causal()
            self.body.head_name = self._find_head()
        weights = [
            getattr(layer, "weight", None) for layer in (self.get_input_embeddings(), self.get_output_embeddings())
        ]
        self.config.tie_word_embeddings = weights[0] is weights[1]

    @property
    def plain(self) -> nn.Module:
        """The wrapped module."""
        return self.body.plain

    @property
    def fitted_tokens(self) -> set[int]:
        """Added tokens whose embedding rows are initialised. Stored in the module, which several wrappers may share."""
        return getattr(self.plain, "fitted_tokens", set())

    @fitted_tokens.setter
    def fitted_tokens(self, tokens: set[int]) -> None:
        self.plain.fitted_tokens = tokens  # type: ignore[assignment]

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of the token ids."""
        return self.body.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """Returns the head; `Identity` if the module has none."""
        name = self.body.head_name
        return self._whole if name is None else self.plain.get_submodule(name)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *_: Any, **__: Any) -> Any:
        """Refuses to resize: only the module's author knows how.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"model: the tokenizer has {new_num_tokens} tokens with those that were added, and "
            f"{type(self.plain).__name__} has rows for {self.config.vocab_size}; build it with as many"
        )

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **_: Any
    ) -> CausalLMOutput:
        """Returns the module's logits `[batch, seq, vocab]`. Left-padded rows (generation) become right-padded.

        A causal module without a mask would otherwise read the padding, and count positions from it.
        """
        if attention_mask is None or attention_mask.shape != input_ids.shape or bool(attention_mask[:, 0].all()):
            return CausalLMOutput(logits=self.body.output(input_ids, position_ids, attention_mask))
        width = input_ids.shape[1]
        padding = (attention_mask == 0).int().argmin(1, keepdim=True)
        positions = torch.arange(width, device=input_ids.device).expand_as(input_ids)
        to_right_padded = (positions + padding) % width
        mask = attention_mask.gather(1, to_right_padded) * (positions < width - padding)
        logits = self.body.output(input_ids.gather(1, to_right_padded), positions, mask)
        to_left_padded = (positions - padding) % width
        return CausalLMOutput(logits=logits.gather(1, to_left_padded[..., None].expand_as(logits)))

    def save_pretrained(self, save_directory: Any, state_dict: Any = None, **_: Any) -> None:  # type: ignore[override]
        """Writes the weights under the module's own names, and its class with constructor arguments, if they are known.

        If they are not, `module_config.json` says how to load the weights.
        """
        folder = Path(save_directory)
        module = self.plain
        save_file(_distinct(module.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
        arguments = _arguments(module)
        description: dict[str, Any] = {"class_path": class_path(module), "init_args": arguments}
        if arguments is None:
            description["how_to_load"] = how_to_load(module)
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")

    def reloaded(self, folder: Path) -> "PlainLM":
        """Loads an exported module: builds it, or if that can't be done, copies this one and loads the weights."""
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        if description["init_args"] is not None:
            return PlainLM(load_module(folder))
        other = copy.deepcopy(self)
        load_weights(other.plain, folder)
        return other

    # ---- checks, and the search for the head

    @property
    def _embedding_weight(self) -> Tensor:
        return cast("nn.Embedding", self.get_input_embeddings()).weight

    def _ids(self) -> Tensor:
        weight = self._embedding_weight
        return torch.arange(PROBE_TOKENS, device=weight.device)[None] % min(len(weight), self.config.vocab_size)

    def _refuse_unless_causal(self) -> None:
        ids, name = self._ids(), type(self.plain).__name__
        logits = self.body.output(ids)
        if logits.shape != (*ids.shape, self.config.vocab_size):
            raise UserError(
                f"model: {name} returns logits {list(logits.shape)} for token ids {list(ids.shape)}; it has to return "
                "[batch, seq, vocabulary], for every token"
            )
        other = ids.clone()
        other[:, -1] = (other[:, -1] + 1) % self.config.vocab_size
        if not _are_near(self.body.output(other)[:, :-1], logits[:, :-1]):
            raise UserError(
                f"model: the logits of {name} depend on later tokens, so it would learn to copy its targets; mask them"
            )

    def _find_head(self) -> str | None:
        """Returns the name of the linear layer whose output is the logits; None if there is none."""
        ids, names = self._ids(), {module: name for name, module in self.plain.named_modules()}
        outputs: dict[str, Tensor] = {}

        def keep(module: nn.Module, _: Any, output: Tensor) -> None:
            outputs[names[module]] = output

        hooks = [module.register_forward_hook(keep) for module in names if isinstance(module, nn.Linear)]
        try:
            logits = self.body.output(ids)
        finally:
            for hook in hooks:
                hook.remove()
        for name, output in reversed(outputs.items()):
            if output.shape != logits.shape or not torch.equal(output.float(), logits.float()):
                continue
            try:
                with _without(self.plain, name):
                    hidden = self.body.output(ids)
                if _are_near(self.plain.get_submodule(name)(hidden), logits):
                    return name
            except (RuntimeError, AttributeError, UserError):  # e.g. the module reads its head's weight as well
                continue
        return None


def logits_of(output: Any) -> Tensor:
    """Returns the logits in a module's output: a tensor, an object or mapping with `logits`, or a tuple led by either.

    Raises:
        UserError: the output has no logits.
    """
    first = output[0] if isinstance(output, tuple) and output and not hasattr(output, "logits") else output
    logits = first.get("logits") if isinstance(first, Mapping) else getattr(first, "logits", first)
    if not isinstance(logits, Tensor):
        raise UserError(f"model: forward returns {type(output).__name__}; it has to return logits, or `.logits`")
    return logits


def class_path(module: nn.Module) -> str:
    """The class path of a module: `package.file.Class`."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def how_to_load(module: nn.Module) -> str:
    """Instructions for loading exported weights if the module can't be built from its folder."""
    return f"build {class_path(module)} yourself, then oumi_pl.models.plain.load_weights(module, folder)"


def load_module(folder: str | Path, **arguments: Any) -> nn.Module:
    """Builds an exported plain module, by importing its class, and loads its weights.

    Args:
        folder: As written by an export.
        arguments: Constructor arguments that add to or replace those in the folder.

    Raises:
        UserError: the folder holds no module, its class can't be imported or built, or the weights don't fit.
    """
    folder = Path(folder).expanduser()
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no exported module: {reason(error)}") from error
    path = description["class_path"]
    if description["init_args"] is None and not arguments:
        raise UserError(f"{folder}: the arguments of {path} are not known: {description['how_to_load']}")
    try:
        module = _class(path)(**((description["init_args"] or {}) | arguments))
    except Exception as error:  # a user's class can raise anything
        raise UserError(f"{folder}: can't build {path}: {reason(error)}") from error
    load_weights(module, folder)
    return module.eval()


def load_weights(module: nn.Module, folder: str | Path) -> None:
    """Loads the weights of an exported plain module.

    Raises:
        UserError: names or shapes differ from the module's.
    """
    saved = load_file(Path(folder).expanduser() / "model.safetensors")
    expected = _distinct(module.state_dict())
    in_file, in_module = ({name: list(v.shape) for name, v in state.items()} for state in (saved, expected))
    if in_file != in_module:
        name = next(n for n in (*in_file, *in_module) if in_file.get(n) != in_module.get(n))
        saved_shape, own_shape = in_file.get(name, "missing"), in_module.get(name, "missing")
        raise UserError(f"{folder}: {name} is {saved_shape} in the file and {own_shape} in {type(module).__name__}")
    module.load_state_dict(saved, strict=False)


# ---- inspecting modules


def _parameters(module: nn.Module) -> tuple[set[str], set[str]]:
    """Returns the names of `forward`'s parameters after the first, and of those among them without a default."""
    parameters = list(inspect.signature(module.forward).parameters.values())[1:]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return {p.name for p in named}, {p.name for p in named if p.default is p.empty}


def _embedding_and_vocabulary(module: nn.Module) -> tuple[str, int]:
    """Returns the name of the embedding that gets the token ids, and the number of logits per token.

    Raises:
        UserError: the module can't be called on token ids, or has no such embedding.
    """
    name = type(module).__name__
    if not isinstance(module, nn.Module):
        raise UserError(f"model: {name} is no model; pass a name, a folder, or an nn.Module from token ids to logits")
    weight = next(module.parameters(), None)
    if weight is None:
        raise UserError(f"model: {name} has no parameters to train")
    ids = torch.zeros(1, 3, dtype=torch.long, device=weight.device)
    names = {m: n for n, m in module.named_modules()}
    called: list[str] = []

    def keep(embedding: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs and inputs[0].shape == ids.shape and torch.equal(inputs[0], ids):
            called.append(names[embedding])

    hooks = [m.register_forward_pre_hook(keep) for m in names if isinstance(m, nn.Embedding)]
    body = PlainBody(PlainConfig(), module)
    try:
        with probing(module, weight.device):
            logits = body.output(ids)
    except UserError:
        raise
    except Exception as error:  # a user's module can raise anything
        raise UserError(
            f"model: {name} can't be called on token ids [batch, seq] ({type(error).__name__}: {reason(error)}); its "
            "forward takes input_ids, and if it likes position_ids and attention_mask, and returns logits"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not called:
        raise UserError(f"model: {name} calls no nn.Embedding on the token ids; it needs one, of its whole vocabulary")
    return called[0], logits.shape[-1]


@contextmanager
def _without(module: nn.Module, name: str | None) -> Iterator[None]:
    """Replaces a submodule by the identity within the block."""
    if name is None or not name:
        yield
        return
    path, _, last = name.rpartition(".")
    parent = module.get_submodule(path)
    own = parent._modules[last]
    parent._modules[last] = nn.Identity()
    try:
        yield
    finally:
        parent._modules[last] = own


def _are_near(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape:
        return False
    tolerance = TOLERANCE.get(theirs.dtype, HALF)
    return float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


# ---- folders


def _distinct(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies tensors to the CPU, each memory once: safetensors refuses tied weights under two names."""
    seen: set[tuple[Any, ...]] = set()
    kept = {}
    for name, value in state.items():
        key = (value.data_ptr(), value.shape, value.stride(), value.device)
        if value.numel() == 0 or key not in seen:
            kept[name] = value.detach().cpu().contiguous().clone()
        seen.add(key)
    return kept


def _class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _arguments(module: nn.Module) -> dict[str, Any] | None:
    """Guesses a module's constructor arguments; None if that fails.

    They are its attributes with the names of the constructor's parameters, and must build a module whose weights have
    the same names and shapes. Whether it also computes the same is checked when the export's logits are compared.
    """
    try:
        if type(module).__module__ == "__main__" or _class(class_path(module)) is not type(module):
            return None
        parameters = inspect.signature(type(module).__init__).parameters.values()
        named = [p for p in list(parameters)[1:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        values = {p.name: getattr(module, p.name, p.default) for p in named}
        arguments = {name: v for name, v in values.items() if isinstance(v, int | float | str | bool | list | None)}
        with torch.random.fork_rng(devices=[]):
            built = type(module)(**json.loads(json.dumps(arguments)))
    except Exception:  # a user's class can raise anything
        return None
    other, own = ({n: v.shape for n, v in m.state_dict().items()} for m in (built, module))
    return arguments if other == own else None
