"""LoRA through PEFT: checks of the recipe's `lora:`, its layers, the embedding rows of added tokens, and merging."""

import copy
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from oumi_pl.attention.probe import body_of, probing
from oumi_pl.errors import UserError, nearest, reason
from oumi_pl.models.sharding import runnable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_VALUES: dict[str, tuple[Any, Any, str]] = {
    "r": (int, lambda r: r > 0, "a whole number, at least 1"),
    "lora_alpha": (int | float, lambda alpha: alpha > 0, "a number above 0"),
    "bias": (str, lambda bias: bias in ("none", "all", "lora_only"), "none, all or lora_only"),
    "lora_dropout": (int | float, lambda p: 0 <= p < 1, "a number from 0 to below 1"),
}
"""Key -> type, condition and description of the values that PEFT would fail on later, without naming the key."""
ALL_LINEAR = "all-linear"
SCORE = "score"
"""Name of the scoring head in transformers' sequence-classification models of causal architectures."""
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def lora_config(lora: dict[str, Any], task: str = "CAUSAL_LM") -> Any:
    """Creates the `peft.LoraConfig` of a recipe's `lora:`; for all linear layers by default.

    Args:
        lora: Keys and values of `peft.LoraConfig`.
        task: PEFT's task type. `SEQ_CLS` also trains and saves the head `score` as a whole.

    Raises:
        UserError: `peft.LoraConfig` does not accept a key or value, or the initialisation rewrites the base.
    """
    from peft import LoraConfig

    known = inspect.signature(LoraConfig).parameters
    for key in lora:
        if key not in known:
            raise UserError(
                f"model.lora.{key}: unknown key{nearest(key, known)} (the keys are those of peft.LoraConfig)"
            )
    for key, (kind, fits, right) in _VALUES.items():
        value = lora.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind) or not fits(value)):
            raise UserError(f"model.lora.{key} is {value!r}, but has to be {right}")
    start = lora.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_REWRITES_BASE):
        # checkpoints and exports hold only the adapter, for the base weights on disk
        raise UserError(f"model.lora.init_lora_weights: {start!r} rewrites the base weights; use true, or 'gaussian'")
    try:
        # copied, because PEFT adds the head of a classifier to `modules_to_save`
        return LoraConfig(**{"task_type": task, "target_modules": ALL_LINEAR} | copy.deepcopy(lora))
    except (ValueError, TypeError) as error:
        raise UserError(f"model.lora: {reason(error)}") from error


def with_lora(
    hf: "PreTrainedModel",
    lora: dict[str, Any],
    added_tokens: Sequence[int] = (),
    revision: str | None = None,
    task: str = "CAUSAL_LM",
) -> Any:
    """Adds LoRA layers to a model and freezes the rest, except for the rows of added tokens.

    Those rows are trained and saved with the adapter, since they have no pretrained values. Adapters are float32
    whatever the dtype of the base.

    Raises:
        UserError: the model has no module that `lora` names, or the rows can't be trained.
    """
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers.pytorch_utils import Conv1D

    config = lora_config(lora, task)
    if added_tokens and "trainable_token_indices" not in lora:
        config.trainable_token_indices = _token_rows(hf, added_tokens, lora.get("modules_to_save") or ())
    if config.target_modules == ALL_LINEAR and config.target_parameters is None:
        _target_all_linear(hf, config)
    if getattr(hf, "is_quantized", False):
        hf = prepare_model_for_kbit_training(hf, use_gradient_checkpointing=False)
    _refuse_unsaved(hf, lora.get("modules_to_save") or ())
    try:
        return get_peft_model(hf, config, revision=revision)
    except ValueError as error:
        if "ParamWrapper does not work with" in str(error):
            setting = str(error).rpartition(" with ")[2].rstrip(".")
            raise UserError(
                f"model.lora: {setting} can't be had for the weights of experts, which {ALL_LINEAR} includes; leave it "
                "out, or name target_modules"
            ) from error
        linear = sorted({n.rsplit(".", 1)[-1] for n, m in hf.named_modules() if isinstance(m, nn.Linear | Conv1D)})
        layers = f"linear layers of this model: {', '.join(linear)}"
        targets = lora.get("target_modules")
        if targets is None or "not found" not in str(error):
            raise UserError(f"model.lora: {reason(error)} ({layers})") from error
        named = [targets] if isinstance(targets, str) else list(targets)
        wrong = next((target for target in named if target not in linear), named[0])
        near = nearest(wrong, linear)
        hint = f"{near} {layers}" if near.startswith("; did") else f"; {layers}"
        raise UserError(f"model.lora.target_modules: {wrong!r} matches no layer{hint}") from error


def merged(hf: Any) -> Any:
    """Adds the adapters of a PEFT model to its weights, in place, and returns the bare model.

    Adapters may change the embedding and the head differently although these share a weight. They are untied first,
    and tied again if they are still equal; else `tie_word_embeddings` of the config becomes false.
    """
    base = hf.get_base_model()
    tying = [part for part in (base.config, base.config.get_text_config()) if part.tie_word_embeddings]
    tied = [_base_layer(layer) for layer in (base.get_input_embeddings(), base.get_output_embeddings())]
    weights: list[Any] = [getattr(layer, "_parameters", {}).get("weight") for layer in tied]  # None: trained whole
    if (weight := weights[0]) is not None and weight is weights[1]:
        tied[1].weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings=True`")  # they are no longer
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        model = hf.merge_and_unload()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_equal = head is None or torch.equal(embedding.weight, head.weight)
    for part in tying:
        part.tie_word_embeddings = is_equal
    if tying and head is not None and is_equal:
        head.weight = embedding.weight
    return model


def _base_layer(layer: Any) -> Any:
    """A layer without PEFT's wrappers."""
    while layer is not None and hasattr(layer, "base_layer"):
        layer = layer.base_layer
    return layer


def _target_all_linear(hf: "PreTrainedModel", config: Any) -> None:
    """Makes `all-linear` mean the same for every architecture.

    That is all linear layers but heads, and experts and routers that are no layers but parameters with a matrix or a
    row per expert. PEFT finds these by the names of a few architectures (Mixtral, Qwen3-MoE), leaves out those of
    others (gpt-oss), and drops shared experts and dense layers whose names are like those of experts. Layers that the
    model never calls, because it reads their weights itself, are left out: an adapter would change nothing.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    from transformers.pytorch_utils import Conv1D

    heads = (hf.get_output_embeddings(), getattr(hf, SCORE, None))
    linear = {n: m for n, m in hf.named_modules() if isinstance(m, nn.Linear | Conv1D) and m not in heads}
    experts = list(_experts(hf))
    unusable = _uncalled(hf, linear) | {n for n in linear if _is_refused(hf, config, n)}
    if not experts and not unusable:
        return
    converted = copy.deepcopy(config)
    converted.target_modules = set(linear)
    convert_peft_config_for_transformers(converted, hf, None)
    # By their weight, not as layers: those that PEFT would take for experts by their name, also when the adapter is
    # loaded, and routers that are linear layers but return more than one value.
    weights = {n for n, m in linear.items() if type(m).__module__.startswith("transformers.models.")}
    weights = (weights | (linear.keys() - set(converted.target_modules))) - unusable
    config.target_modules = linear.keys() - weights - unusable
    config.target_parameters = sorted({_below_layer(n) for n in (*experts, *(f"{n}.weight" for n in weights))}) or None


def _uncalled(hf: "PreTrainedModel", linear: Mapping[str, nn.Module]) -> set[str]:
    """Names of the layers that are not called although the module that holds them is, in a pass over a few tokens."""
    called: set[nn.Module] = set()
    parents = {n: hf.get_submodule(n.rpartition(".")[0]) for n in linear}
    hooks = [
        module.register_forward_pre_hook(lambda module, _: called.add(module))
        for module in {*linear.values(), *parents.values()}
    ]
    body = body_of(hf)
    try:
        with probing(hf, hf.device), runnable(hf):
            ids = torch.arange(2, 10, device=hf.device)[None] % hf.config.get_text_config().vocab_size
            body(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {n for n, m in linear.items() if m not in called and parents[n] in called}


def _is_refused(hf: "PreTrainedModel", config: Any, name: str) -> bool:
    """Whether PEFT refuses a layer: the fast kernels of Mamba read the weights of some themselves."""
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    try:
        _check_lora_target_modules_mamba(config, hf, name.rpartition(".")[2])
    except ValueError:
        return True
    return False


def _experts(hf: "PreTrainedModel") -> Iterator[str]:
    """Names of the parameters `[experts, in, out]` or `[experts, out, in]`, and of routers `[experts, in]`."""
    config = hf.config.get_text_config().to_dict()
    counts = {v for k, v in config.items() if "experts" in k and "experts_per" not in k and isinstance(v, int)} - {1}
    for path, module in hf.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding | nn.modules.conv._ConvNd):
            for name, parameter in module.named_parameters(prefix=path, recurse=False):
                if parameter.ndim in (2, 3) and parameter.shape[0] in counts:
                    yield name


def _below_layer(name: str) -> str:
    """A name without the path to the layer, which is the same in each: `mlp.experts.down_proj`."""
    parts = name.split(".")
    return ".".join(parts[max((i for i, part in enumerate(parts) if part.isdigit()), default=-1) + 1 :])


def _refuse_unsaved(hf: "PreTrainedModel", saved: Sequence[str]) -> None:
    """Refuses unknown names in `modules_to_save`, which PEFT would ignore."""
    paths = [name for name, _ in hf.named_modules() if name]
    for wanted in [saved] if isinstance(saved, str) else saved:
        if not any(path == wanted or path.endswith(f".{wanted}") for path in paths):
            known = {path.rpartition(".")[2] for path in paths if not path.rpartition(".")[2].isdigit()}
            raise UserError(f"model.lora.modules_to_save: the model has no module {wanted!r}{nearest(wanted, known)}")


def _token_rows(
    hf: "PreTrainedModel", added_tokens: Sequence[int], saved: Sequence[str]
) -> dict[str, list[int]] | None:
    """The rows to train by layer: of the embedding, and of the head unless they are tied."""
    names = {module: name for name, module in hf.named_modules()}
    embedding, head = hf.get_input_embeddings(), hf.get_output_embeddings()
    layers = [embedding]
    if head is not None and head.weight is not embedding.weight:
        layers.append(head)
    layers = [layer for layer in layers if not names[layer].endswith(tuple(saved))]
    if head in layers and getattr(head, "bias", None) is not None:
        name, both = names[head], f"[{names[embedding]}, {names[head]}]"
        raise UserError(
            f"model.lora: tokens were added, and {name} has a bias, so that PEFT can't train single rows of it; "
            f"train it whole (modules_to_save: {both}), or use a chat template without new tokens"
        )
    return {names[layer]: list(added_tokens) for layer in layers} or None
