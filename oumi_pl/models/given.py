"""Models that Python passes as objects, instead of naming a folder or a model on the hub."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from oumi_pl import attention
from oumi_pl.errors import UserError, reason
from oumi_pl.models.build import fit_vocabulary, freeze_adapters, freeze_modules, refuse_attention
from oumi_pl.models.lora import with_lora
from oumi_pl.models.recomputation import Recomputation, recompute

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def as_model(model: Any, **instead: Any) -> "PreTrainedModel":
    """The model that was passed as an object; a plain `nn.Module` gets the interface of a model of transformers.

    Args:
        model: What was passed as `model`.
        instead: Settings by name that apply only to models which are loaded or built; None where left out.

    Raises:
        UserError: it can't be trained as it is.
    """
    from peft import PeftModel
    from transformers import PreTrainedModel

    name = type(model).__name__
    if isinstance(model, PeftModel):
        raise UserError("model: a PeftModel has its adapters already; pass its base model, and `lora: {r: 16, …}`")
    for key, value in instead.items():
        if value is not None:
            raise UserError(f"model.{key}: {name} was passed as an object, which is trained as it is; leave {key} out")
    if not isinstance(model, PreTrainedModel):
        from oumi_pl.models.plain import PlainLM

        return PlainLM(model)
    if model.get_output_embeddings() is None:
        raise UserError(f"model: {name} has no output head; load it with AutoModelForCausalLM")
    if any("lora_" in parameter for parameter, _ in model.named_parameters()):
        raise UserError(f"model: this {name} has adapters in its layers already; pass a new one, or merge them first")
    return model


def is_plain(model: Any) -> bool:
    """Whether a model is a plain `nn.Module` with the interface of a model of transformers."""
    from oumi_pl.models.plain import PlainLM  # here, since it imports transformers

    return isinstance(model, PlainLM)


def adopt(
    hf: "PreTrainedModel",
    *,
    tokenizer: "PreTrainedTokenizerBase | None",
    added_tokens: Sequence[int] = (),
    lora: dict[str, Any] | None = None,
    freeze: Sequence[str] = (),
    gradient_checkpointing: bool | Recomputation = False,
) -> Any:
    """Prepares a model object for training as `build_model` prepares a loaded one; returns it, or a PEFT model of it.

    The object itself is trained. Rows of added tokens are initialised once, also if several modules use the object.

    Raises:
        UserError: parts don't fit together.
    """
    attention.register()
    fitted: set[int] = getattr(hf, "fitted_tokens", set())
    new_rows = 0
    if tokenizer is not None:
        new_rows = fit_vocabulary(hf, tokenizer, [i for i in added_tokens if i not in fitted], added_tokens)
        hf.fitted_tokens = fitted | set(added_tokens)  # type: ignore[assignment]
    freeze_modules(cast("Any", hf).plain if is_plain(hf) else hf, freeze)
    recompute(hf, gradient_checkpointing, _name(hf))
    trained: Any = hf
    if lora is not None:
        trained = with_lora(hf, lora, added_tokens)
        freeze_adapters(trained, freeze)
        trained.why_not_alone = "its base model was passed as an object" if new_rows or not hf.name_or_path else ""
    return trained.train()


def set_attention(hf: "PreTrainedModel", name: str) -> None:
    """Sets the attention implementation of a model.

    Raises:
        UserError: it has no such implementation.
    """
    if is_plain(hf) and name not in (attention.NAME, "eager"):  # what it has without being asked
        raise UserError(f"model.attn: {_name(hf)} has none of the attentions of transformers; leave it out")
    if hf.config._attn_implementation == name:
        return
    try:
        hf.set_attn_implementation(name)
    except (ValueError, KeyError, ImportError) as error:
        refuse_attention(name, error)
        raise UserError(f"model.attn: {name!r} does not work for this model: {reason(error)}") from error


def _name(hf: Any) -> str:
    return type(hf.plain if is_plain(hf) else hf).__name__
