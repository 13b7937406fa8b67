"""Plain `nn.Module`s as models: any module from token ids to logits, with the interface of a model of transformers."""

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
"""File of an exported module's folder: its class, and the arguments that build it."""
PROBE_TOKENS = 8
"""Tokens on which a module is tried before it is trained."""
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""How far two computations of the same logits may be from each other, as a share of the largest; else `HALF`."""
HALF = 5e-2


class PlainConfig(PretrainedConfig):
    """The config of a plain module: the size of its vocabulary."""

    model_type = "plain_module"

    def __init__(self, vocab_size: int = 1, **kwargs: Any) -> None:
        self.vocab_size = vocab_size
        super().__init__(**({"tie_word_embeddings": False, "use_cache": False} | kwargs))


class PlainBody(PreTrainedModel):
    """A plain module up to its head."""

    config_class = PlainConfig

    def __init__(self, config: PlainConfig, module: nn.Module) -> None:
        super().__init__(config)
        self.all_tied_weights_keys: dict[str, str] = {}
        self.plain = module
        self.embedding_name: str = ""
        self.head_name: str | None = None
        """Names of the embedding and of the head in the module; without a head, logits serve as hidden states."""
        self.takes, self.required = _parameters(module)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of the token ids."""
        return self.plain.get_submodule(self.embedding_name)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None, **_: Any
    ) -> BaseModelOutput:
        """Runs the module up to its head."""
        with _without(self.plain, self.head_name):
            return BaseModelOutput(self.output(input_ids, position_ids, attention_mask))

    def output(self, ids: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Calls the module on ids `[batch, seq]`, with positions and mask if it takes them.

        Raises:
            UserError: its table of positions is too short for these ids.
        """
        named: dict[str, Tensor] = {}
        if "position_ids" in self.takes:
            places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
            named["position_ids"] = places if positions is None else positions
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
    """A plain module as a causal LM of transformers. The module itself is `plain`, and is trained in place."""

    config_class = PlainConfig
    base_model_prefix = "body"

    def __init__(self, module: nn.Module) -> None:
        """Runs the module on a few token ids, to find its embedding and its head.

        Raises:
            UserError: it isn't a causal language model.
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
        """The module."""
        return self.body.plain

    @property
    def fitted_tokens(self) -> set[int]:
        """Added tokens whose rows have values; kept at the module, which may be trained by several wrappers."""
        return getattr(self.plain, "fitted_tokens", set())

    @fitted_tokens.setter
    def fitted_tokens(self, tokens: set[int]) -> None:
        self.plain.fitted_tokens = tokens  # type: ignore[assignment]

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of the token ids."""
        return self.body.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The head; `Identity` if none was found."""
        name = self.body.head_name
        return self._whole if name is None else self.plain.get_submodule(name)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *_: Any, **__: Any) -> Any:
        """Refuses: only its author knows how the module can grow.

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
        """The module's own logits. Rows padded on the left, as in generation, are run as rows padded on the right."""
        if attention_mask is None or attention_mask.shape != input_ids.shape or bool(attention_mask[:, 0].all()):
            return CausalLMOutput(logits=self.body.output(input_ids, position_ids, attention_mask))
        width = input_ids.shape[1]
        padding = (attention_mask == 0).int().argmin(1, keepdim=True)
        places = torch.arange(width, device=input_ids.device).expand_as(input_ids)
        taken = (places + padding) % width
        mask = attention_mask.gather(1, taken) * (places < width - padding)
        logits = self.body.output(input_ids.gather(1, taken), places, mask)
        back = (places - padding) % width
        return CausalLMOutput(logits=logits.gather(1, back[..., None].expand_as(logits)))

    def save_pretrained(self, save_directory: Any, state_dict: Any = None, **_: Any) -> None:  # type: ignore[override]
        """Writes the module's weights under its own names, and its class with the arguments that build it, if known.

        If no arguments are known, the description says how to load the weights.
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
        """The module as built from a folder; a copy of this one with the folder's weights if it can't be built."""
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        if description["init_args"] is not None:
            return PlainLM(load_module(folder))
        other = copy.deepcopy(self)
        load_weights(other.plain, folder)
        return other

    # ---- what the module does

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
        """The name of the linear layer that gives the logits; None if something else does."""
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
            except (RuntimeError, AttributeError, UserError):  # the module reads more of its head than its output
                continue
        return None


def logits_of(output: Any) -> Tensor:
    """The logits of a module's output: a tensor, an object with `logits`, or a tuple that begins with one of them.

    Raises:
        UserError: there are none.
    """
    first = output[0] if isinstance(output, tuple) and output and not hasattr(output, "logits") else output
    logits = first.get("logits") if isinstance(first, Mapping) else getattr(first, "logits", first)
    if not isinstance(logits, Tensor):
        raise UserError(f"model: forward returns {type(output).__name__}; it has to return logits, or `.logits`")
    return logits


def class_path(module: nn.Module) -> str:
    """The class path of a module."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def how_to_load(module: nn.Module) -> str:
    """What to do to load exported weights into a module that can't be built again."""
    return f"build {class_path(module)} yourself, then oumi_pl.models.plain.load_weights(module, folder)"


def load_module(folder: str | Path, **arguments: Any) -> nn.Module:
    """Builds an exported plain module, by importing its class, and loads its weights.

    Args:
        folder: As written by an export.
        arguments: Of the class, beside or instead of those in the folder.

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
        UserError: they are those of another module.
    """
    saved = load_file(Path(folder).expanduser() / "model.safetensors")
    wanted = _distinct(module.state_dict())
    shapes, own = ({name: list(v.shape) for name, v in state.items()} for state in (saved, wanted))
    if shapes != own:
        name = next(n for n in (*shapes, *own) if shapes.get(n) != own.get(n))
        here, there = own.get(name, "missing"), shapes.get(name, "missing")
        raise UserError(f"{folder}: {name} is {there} in the file and {here} in {type(module).__name__}")
    module.load_state_dict(saved, strict=False)


# ---- modules


def _parameters(module: nn.Module) -> tuple[set[str], set[str]]:
    """Names of the parameters of a module's `forward` after the first, and of those without a default."""
    parameters = list(inspect.signature(module.forward).parameters.values())[1:]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return {p.name for p in named}, {p.name for p in named if p.default is p.empty}


def _embedding_and_vocabulary(module: nn.Module) -> tuple[str, int]:
    """The name of the embedding that is called with the token ids, and the number of logits.

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
    """Replaces a submodule by the identity."""
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
    """Tensors on the CPU, without second names of the same memory, which safetensors doesn't write."""
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
    """Arguments that build a module with the same weights' shapes and names; None if none are known.

    They are its attributes with the names of its constructor's parameters. Whether they build the same module is seen
    when its logits are compared.
    """
    try:
        if type(module).__module__ == "__main__" or _class(class_path(module)) is not type(module):
            return None
        parameters = inspect.signature(type(module).__init__).parameters.values()
        named = [p for p in list(parameters)[1:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        values = {p.name: getattr(module, p.name, p.default) for p in named}
        arguments = {name: v for name, v in values.items() if isinstance(v, int | float | str | bool | list | None)}
        with torch.random.fork_rng():
            built = type(module)(**json.loads(json.dumps(arguments)))
    except Exception:  # a user's class can raise anything
        return None
    other, own = ({n: v.shape for n, v in m.state_dict().items()} for m in (built, module))
    return arguments if other == own else None
