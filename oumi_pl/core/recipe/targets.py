"""Which tokens of an Oumi config carry loss, and by which chat template rows are rendered."""

from typing import Any

from oumi_pl.core.configs import DatasetSplitParams, ModelParams, TrainingConfig
from oumi_pl.core.configs.params.data_params import COMPLETIONS_COLLATOR as COMPLETIONS
from oumi_pl.core.recipe import files
from oumi_pl.core.recipe.notes import Notes, refuse
from oumi_pl.core.recipe.sources import Registered
from oumi_pl.data.template import OUMI
from oumi_pl.errors import nearest

PADDING = "text_with_padding"
HARMLESS = ("ignore_index", "pad_to_multiple_of", "max_variable_sized_dims", "debug")
"""Options of collators that don't decide what carries loss."""
TEMPLATES = ("response_template", "instruction_template", "end_of_turn_template")
NESTED = ("tool_response_template", "end_of_tool_response_template")

VISION_TEMPLATES = ("qwen2-vl-instruct", "qwen3-vl-instruct", "internvl3", "llava", "molmo")
PLACE = "data.init_args.train_on"


def template(params: ModelParams, notes: Notes) -> str | None:
    """`data.template`; None for the tokenizer's own.

    Raises:
        UserError: there is no such template, or it is for images.
    """
    name = params.chat_template
    known = {path.rpartition("/")[2]: path for path in OUMI} | {"default_gen": "oumi/default"}
    if name is None:
        kind = files.model_type(params, online=notes.online)
        if kind == "gpt2" or (kind is None and "gpt2" in params.model_name.lower()):
            notes.comment("data.init_args.template", "Oumi's template gpt2 replaces whatever template a GPT-2 has")
            return known["gpt2"]
        has_one = files.has_template(params, online=notes.online)
        if has_one is False:
            notes.comment(
                "data.init_args.template",
                "the tokenizer has no chat template; as in Oumi, its `default` is used, which has no special tokens "
                "and rarely gives good results: name another one as model.chat_template",
            )
            return known["default"]
        if has_one is None:
            notes.comment(
                "data", "if the tokenizer has no chat template, Oumi takes its own `default`: template: oumi/default"
            )
        return None
    if name == "auto":
        return None
    if name.lower() in VISION_TEMPLATES:
        refuse("model.chat_template", f"{name} is for models that see, and images are not trained on")
    if name.lower() not in known:
        near = nearest(name, [*known, "auto"])
        refuse("model.chat_template", f"Oumi has no template {name!r}{near} 'auto' is the tokenizer's own")
    return known[name.lower()]


def train_on(config: TrainingConfig, entries: list[Registered], notes: Notes) -> str:
    """`data.train_on` of conversations: `all` unless the config says otherwise in one of Oumi's three ways.

    Args:
        config: The config.
        entries: How Oumi reads each training set.
        notes: Where comments go.

    Raises:
        UserError: collator options without a counterpart, or ways that contradict each other.
    """
    split = config.data.train
    name = split.collator_name
    assistant_only = {bool(dataset.dataset_kwargs.get("assistant_only")) for dataset in split.datasets}
    raw = all(entry.kind == "raw" for entry in entries)
    if name == COMPLETIONS:
        tokens = _by_collator(split)
        notes.comment(
            PLACE,
            "what the assistant writes is found by the template, and not by searching ids; the newlines around it, "
            "which Oumi trains, carry no loss, and rows without any are left out",
        )
    elif assistant_only == {True}:
        tokens = "assistant"
        notes.comment(
            PLACE,
            "assistant_only: what the assistant writes is found by the template; the newlines around it, which Oumi "
            "trains, carry no loss",
        )
    elif raw:
        tokens = _by_trl(config.training.trainer_kwargs, notes)
    else:
        tokens = "all"
        trainer = config.training.trainer_type.name
        if trainer in ("HF", "OUMI") or (trainer == "TRL_SFT" and name == PADDING):
            which = f"{trainer} with {name or 'no collator'}"
            same = "has no labels in Oumi and fails; here every token is trained, as with TRL_SFT"
            notes.comment(PLACE, f"{which} {same}")
    if len(assistant_only) > 1:
        refuse("data.train.datasets", "some say dataset_kwargs.assistant_only and others do not; train_on is for all")
    notes.became["data.train.collator_name"] = f"data.train_on: {tokens}"
    return tokens


def refuse_collators(split: DatasetSplitParams, place: str, allowed: tuple[str | None, ...]) -> None:
    """Refuses collators of images, and those that this kind of training has no use for.

    Raises:
        UserError: at such a collator, or an option of it without a counterpart.
    """
    name = split.collator_name
    if name is not None and name.startswith("vision"):
        refuse(f"{place}.collator_name", f"{name} is for images, and images are not trained on")
    if name not in allowed:
        refuse(f"{place}.collator_name", f"{name} has no counterpart here; leave it out")
    for key, value in split.collator_kwargs.items():
        if key in NESTED and value is not None:
            refuse(f"{place}.collator_kwargs.{key}", "results of tools are turns of their own here, without loss")
        if key not in (*HARMLESS, *TEMPLATES, *NESTED, "train_target"):
            refuse(f"{place}.collator_kwargs.{key}", "has no counterpart; leave it out")


def _by_collator(split: DatasetSplitParams) -> str:
    kwargs = split.collator_kwargs
    target = kwargs.get("train_target") or split.train_target
    if target is not None:
        names = {"all_assistant_turns": "assistant", "final_assistant_turn": "last_turn"}
        if (name := str(target).lower()) not in names:
            refuse("data.train.collator_kwargs.train_target", f"unknown {target!r}{nearest(name, names)}")
        return names[name]
    if not kwargs.get("response_template"):
        refuse("data.train.train_target", f"missing: {COMPLETIONS} needs it, e.g. ALL_ASSISTANT_TURNS")
    several = kwargs.get("end_of_turn_template") or kwargs.get("instruction_template")
    return "assistant" if several else "last_turn"


def _by_trl(kwargs: dict[str, Any], notes: Notes) -> str:
    """What TRL trains on of rows that Oumi hands to it as they are."""
    only = kwargs.get("completion_only_loss")
    if kwargs.get("assistant_only_loss"):
        return "assistant"
    if only is None:
        notes.comment(
            PLACE,
            "of rows with `prompt` and `completion` the completion, of others all, as in TRL; which also trains what "
            "the template writes after the end of the completion's turn",
        )
        return "completion_or_all"
    return "completion" if only else "all"
