"""The data of axolotl's YAML: how each `type` reads a row, and which chat template renders it."""

from collections.abc import Mapping
from typing import Any

from oumi_pl.convert.settings import Settings
from oumi_pl.core.recipe.notes import given

FORMATS = "oumi_pl.convert.formats"
TRAIN = "data.init_args.train"

TEMPLATES = {
    "tokenizer_default": None,
    "chatml": "chatml",
    "nemotron_h": "chatml",
    "llama3": "llama3",
    "llama3_2_vision": "trl/llama3_2",
    "gemma": "trl/gemma",
    **dict.fromkeys(("gemma3", "gemma3n"), "trl/gemma3"),
    **dict.fromkeys(("gemma4", "gemma4_unified"), "trl/gemma4"),
    "qwen_25": "trl/qwen2_5",
    **dict.fromkeys(("qwen3", "qwen3_5"), "trl/qwen3"),
    "falcon_h1": "oumi/chat_ml",
    "phi_35": "oumi/phi3-instruct",
    **dict.fromkeys(("cohere", "aya"), "trl/cohere"),
    "deepseek_v3": "trl/deepseekv3",
}
"""axolotl's name of a chat template -> ours, which writes the same text for turns with text."""

INSTRUCTIONS = {
    **dict.fromkeys(("alpaca", "alpaca:instruct", "gpteacher"), "alpaca"),
    **dict.fromkeys(("alpaca:chat", "alpaca_chat.load"), "alpaca_chat"),
    "alpaca:chatml": "alpaca_chatml",
    "alpaca:phi": "alpaca_phi",
}
"""`type` -> format, which writes its prompt as text."""
CHATS = ("chat_template", "chat_template.default", "sharegpt", "chat_template.load", "messages", "messages.chat")
TEXTS = ("completion", "pretrain")

PAIRS: dict[str, Mapping[str, str]] = {
    "default": {},
    "prompt_pairs": {"question": "prompt"},
    "intel": {},
    "icr": {"question": "input"},
    "ultra": {},
    "argilla_chat": {},
    "argilla": {"question": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"},
}
"""End of a `type` of pairs -> its columns, by the names that the format reads."""
QUESTIONS = ("prompt_pairs", "intel", "icr", "argilla")
"""Those whose question is text that the template renders."""
FEEDBACK: dict[str, Mapping[str, str]] = {
    "ultra": {"question": "prompt", "answer": "completion"},
    "prompt_pairs": {"question": "prompt", "answer": "completion"},
    "intel": {"answer": "completion"},
    "argilla": {"question": "instruction", "answer": "completion"},
    "argilla_chat": {"messages": "completion"},
}
"""End of a `type` of KTO -> its columns, by the names that the format reads."""

SOURCE_KEYS = ("path", "type", "name", "split", "data_files", "ds_type", "revision")
CHAT_KEYS = (
    "field_messages",
    "message_property_mappings",
    "message_field_role",
    "message_field_content",
    "roles",
    "roles_to_train",
    "train_on_eos",
    "train_on_eot",
    "chat_template",
    "chat_template_jinja",
    "drop_system_message",
    "field_tools",
    "field_thinking",
    "template_thinking_key",
    "split_thinking",
    "message_field_training",
    "message_field_training_detail",
    "field_chosen",
    "field_rejected",
    "field_prompt",
    "field_completion",
    "field_label",
    "conversation",
)
OTHER_KEYS = ("field", "text_column", "preprocess_shards", "trust_remote_code", "skip", "eval_max_length")


def data(settings: Settings, kind: str) -> tuple[str, dict[str, Any]]:
    """The section `data`, and the trainer type: text alone makes `SFT` a `Pretrain`.

    Raises:
        UserError: something has no counterpart.
    """
    listed = _listed(settings, "datasets") or _listed(settings, "pretraining_dataset")
    if not listed:
        settings.refuse("datasets", "missing, so there is nothing to train on")
    pretraining = settings.has("pretraining_dataset") and not settings.has("datasets")
    texts = [pretraining or str(one.get("type")).partition(":")[0] in TEXTS for one in listed]
    kind = "Pretrain" if kind == "SFT" and all(texts) else kind
    args = _tokenizer(settings) | {"train": _unlisted([_source(settings, one, kind) for one in listed])}
    args |= _validation(settings, kind, args["train"])
    args["max_length"] = int(settings.noted("sequence_len", 512, "data.init_args.max_length"))
    if kind == "Pretrain":
        return kind, {"class_path": "PretrainData", "init_args": args | _documents(settings, streamed=pretraining)}
    name = _template_name(settings, listed)
    args |= given(template=_template(settings, name), template_variables=settings.get("chat_template_kwargs"))
    args["overflow"] = _overflow(settings)
    args |= _rows(settings, kind) | _loading(settings)
    return kind, {"class_path": f"{kind}Data", "init_args": args}


def _listed(settings: Settings, key: str) -> list[dict[str, Any]]:
    value = settings.get(key) or []
    value = [{"path": value}] if isinstance(value, str) else [value] if isinstance(value, Mapping) else value
    return [{k: v for k, v in one.items() if v is not None} for one in value]


def _unlisted(sources: list[Any]) -> Any:
    return sources[0] if len(sources) == 1 else sources


def _tokenizer(settings: Settings) -> dict[str, Any]:
    special = dict(settings.get("special_tokens") or {})
    pad = special.pop("pad_token", None)
    if special:
        which = ", ".join(f"{name} {value!r}" for name, value in special.items())
        settings.comment("data", f"special_tokens: the tokenizer's own are kept, and not {which}")
    own = settings.get("tokenizer_config")
    return given(tokenizer=own if own != settings.get("base_model") else None, pad_token=pad) | given(
        tokens=settings.get("tokens") or None
    )


# --- sources ----------------------------------------------------------------------------------------------------------


def _source(settings: Settings, one: dict[str, Any], kind: str) -> dict[str, Any]:
    path = str(one.get("path"))
    for key in one:
        if key not in (*SOURCE_KEYS, *CHAT_KEYS, *OTHER_KEYS):
            settings.refuse("datasets", f"{path}: {key} has no counterpart")
    files = one.get("data_files")
    if files:
        files = files if isinstance(files, list) else [files]
        if path not in ("json", "csv", "parquet", "text", "arrow") or len(files) > 1:
            settings.comment(TRAIN, f"{path}: only its {', '.join(files)}: fetch it and name it as path")
        else:
            path = str(files[0])
    source = {"path": path} | given(config=one.get("name"), revision=one.get("revision"))
    source |= {"split": one["split"]} if one.get("split", "train") != "train" else {}
    return source | _READERS[kind](settings, one)


def _conversations(settings: Settings, one: Mapping[str, Any]) -> dict[str, Any]:
    name = one.get("type")
    if isinstance(name, Mapping):
        settings.refuse(
            "datasets", f"{one['path']}: a type of your own is a function here: write it, and name it as format"
        )
    name = str(name)
    if name in INSTRUCTIONS:
        settings.comment("data", "prompt and answer are tokenized as one text; axolotl tokenizes them apart")
        return {"format": f"{FORMATS}.{INSTRUCTIONS[name]}"}
    if name.partition(":")[0] in TEXTS:
        settings.comment(TRAIN, f"{one['path']}: longer texts are left out; axolotl divides them")
        return {"format": "text"} | _renamed({"text": one.get("field", "text")})
    if name == "None":
        settings.refuse("datasets", f"{one['path']}: rows without a type are token ids already; name their texts")
    if name not in CHATS:
        known = ", ".join((*INSTRUCTIONS, *CHATS[:1], *TEXTS))
        settings.refuse(
            "datasets", f"{one['path']}: type {name} has no counterpart (known: {known}); write it as a format"
        )
    _check_turns(settings, one)
    column = one.get("field_messages", "conversations" if name == "sharegpt" else "messages")
    if one.get("drop_system_message"):
        return {"format": f"{FORMATS}.without_system"} | _renamed(
            {"messages": column, "tools": one.get("field_tools", "tools")}
        )
    if column == "conversations":
        return {"format": "sharegpt"} | _renamed({"tools": one.get("field_tools", "tools")})
    return {"format": "messages"} | _renamed({"messages": column, "tools": one.get("field_tools", "tools")})


ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "function": "tool", "observation": "tool"}
"""Name of a role -> the one that is read here; others keep theirs."""
PROPERTIES = {"role": ("role", "from"), "content": ("content", "value")}


def _check_turns(settings: Settings, one: Mapping[str, Any]) -> None:
    """Refuses keys of turns and roles that are read otherwise here."""
    mapping = dict(one.get("message_property_mappings") or {})
    mapping |= {name: one[f"message_field_{name}"] for name in ("role", "content") if f"message_field_{name}" in one}
    for name, key in mapping.items():
        if key not in PROPERTIES.get(name, (name,)):
            settings.refuse("datasets", f"{one['path']}: turns with {name} in {key!r} need a format of your own")
    for target, names in dict(one.get("roles") or {}).items():
        if any(ROLES.get(role, role) != target for role in names):
            settings.refuse("datasets", f"{one['path']}: roles {names} as {target!r} need a format of your own")
    trained = {ROLES.get(role, role) for role in one.get("roles_to_train") or ["assistant"]}
    if trained != {"assistant"}:
        settings.refuse("datasets", f"{one['path']}: roles_to_train {sorted(trained)}: only the assistant's turns are")
    for key in ("train_on_eos", "train_on_eot"):
        if one.get(key, "turn") != "turn":
            settings.comment(
                "data.init_args.train_on", f"{key}: {one[key]}: the end of each trained turn is trained here"
            )
    if one.get("message_field_training", "train") not in ("weight", "loss", "train", "training", "masked"):
        settings.refuse("datasets", f"{one['path']}: rename {one['message_field_training']!r} in turns to `train`")


def _documents_source(settings: Settings, one: Mapping[str, Any]) -> dict[str, Any]:
    return _renamed({"text": one.get("field", one.get("text_column", "text"))})


def _pairs(settings: Settings, one: Mapping[str, Any]) -> dict[str, Any]:
    name = str(one.get("type", "passthrough"))
    base, _, end = name.rpartition(".")
    if name in ("passthrough", "None"):
        return {}
    if base in ("chat_template", "bradley_terry") and end in ("default", "chat_template"):
        if base == "bradley_terry":
            return {"format": "question_preference"} | _renamed({"question": "input"})
        columns = {name: one.get(f"field_{name}", name) for name in ("messages", "chosen", "rejected")}
        _check_turns(settings, one)
        return {"format": "messages_preference"} | _renamed(columns)
    if end == "argilla" and base == "chat_template":
        return {"format": "implicit_prompt"}
    if base not in ("chatml", "llama3", "chat_template", "bradley_terry") or end not in PAIRS:
        settings.refuse("datasets", f"{one['path']}: type {name} has no counterpart; write it as a format")
    shape = {"format": "question_preference"} if end in QUESTIONS else {}
    return shape | _renamed(PAIRS[end])


def _feedback(settings: Settings, one: Mapping[str, Any]) -> dict[str, Any]:
    name = str(one.get("type"))
    base, _, end = name.rpartition(".")
    if base not in ("chatml", "llama3") or end not in FEEDBACK:
        settings.refuse("datasets", f"{one['path']}: type {name} has no counterpart; write it as a format")
    return _renamed(FEEDBACK[end])


_READERS = {
    "SFT": _conversations,
    "Pretrain": _documents_source,
    "DPO": _pairs,
    "Reward": _pairs,
    "KTO": _feedback,
}
"""Trainer type -> how its sources are read."""


def _renamed(columns: Mapping[str, Any]) -> dict[str, Any]:
    """`columns` of a source, for those that have another name than the format's."""
    return given(columns={field: column for field, column in columns.items() if field != column})


# --- which rows, and how they are read --------------------------------------------------------------------------------


def _validation(settings: Settings, kind: str, train: Any) -> dict[str, Any]:
    if tests := _listed(settings, "test_datasets"):
        return {"validation": _unlisted([_source(settings, one, kind) for one in tests])}
    size = float(settings.get("val_set_size", 0.0))
    if size >= 1:
        settings.comment(TRAIN, f"val_set_size: {int(size)} rows: name a source or a fraction as validation")
        return {}
    if size and kind == "Pretrain":
        settings.comment(
            TRAIN, f"val_set_size {size}: of documents no fraction is held out: name a source as validation"
        )
        return {}
    return {"validation": size} if size else {}


OVERFLOW = {"drop": "drop", "truncate": "keep_start", "raise": "error"}


def _overflow(settings: Settings) -> str:
    name = str(settings.noted("excess_length_strategy", "drop", "data.init_args.overflow")).lower()
    if name not in OVERFLOW:
        settings.refuse("excess_length_strategy", f"{name!r} is none of {', '.join(OVERFLOW)}")
    return OVERFLOW[name]


def _rows(settings: Settings, kind: str) -> dict[str, Any]:
    section = given(duplicates="drop" if settings.get("dataset_exact_deduplication") else None)
    if settings.get("shuffle_merged_datasets") is False or settings.get("curriculum_sampling"):
        settings.comment(TRAIN, "rows are shuffled; axolotl takes them in order")
    if settings.get("min_sample_len"):
        settings.comment(TRAIN, f"min_sample_len {settings.get('min_sample_len')}: short rows are kept; use `where`")
    if settings.get("streaming"):
        settings.comment(TRAIN, "rows are read and tokenized before training, and not streamed")
    if kind != "SFT":
        return section
    section |= given(train_on="all" if settings.get("train_on_inputs") else None)
    if settings.get("sample_packing"):
        return section | {"packing": True}
    return section | {"group_by_length": bool(settings.get("group_by_length", False))}


def _loading(settings: Settings) -> dict[str, Any]:
    return {"batch_size": int(settings.noted("per_device_train_batch_size", 1, "data.init_args.batch_size"))} | given(
        eval_batch_size=settings.get("per_device_eval_batch_size"),
        workers=settings.get("dataloader_num_workers") or None,
        trust_remote_code=bool(settings.get("trust_remote_code")),
    )


def _documents(settings: Settings, *, streamed: bool) -> dict[str, Any]:
    settings.comment(
        "data",
        "documents are packed whole, and only those longer than a row are divided; each token is trained once"
        + (", where axolotl's windows overlap by up to 256 tokens" if streamed else ""),
    )
    section: dict[str, Any] = {"packing": "best_fit", "isolate": settings.get("pretrain_multipack_attn") is not False}
    if streamed:
        if int(settings.get("max_steps", -1)) <= 0:
            settings.refuse("max_steps", "missing: data that are streamed have no known end")
        section |= {"streaming": True, "exhausted": "restart"}
    return section | _loading(settings)


# --- the template -----------------------------------------------------------------------------------------------------


def _template_name(settings: Settings, listed: list[dict[str, Any]]) -> str | None:
    """Axolotl's name of the template that renders the rows; None if none does."""
    types = [str(one.get("type")) for one in listed]
    named = {
        one.get("chat_template") or settings.get("chat_template") or _in_type(kind) or "tokenizer_default"
        for one, kind in zip(listed, types, strict=True)
        if kind not in INSTRUCTIONS and kind.partition(":")[0] not in TEXTS
    }
    if len(named) > 1:
        settings.refuse("chat_template", f"{', '.join(sorted(named))}: all rows have one template here")
    return next(iter(named), None)


def _in_type(kind: str) -> str | None:
    base = kind.partition(".")[0]
    return base if base in ("chatml", "llama3") else None


def _template(settings: Settings, name: str | None) -> str | None:
    if name is None:
        return None
    if name == "jinja":
        path = str(settings.get("chat_template_jinja", ""))
        if not path.endswith((".jinja", ".jinja2")):
            settings.refuse("chat_template_jinja", "save the template to a .jinja file, and name that")
        return path
    if name.startswith("tokenizer_default_fallback_"):
        other = name.removeprefix("tokenizer_default_fallback_")
        settings.comment("data", f"if the tokenizer has no template, set template: {TEMPLATES.get(other) or other}")
        return None
    if name not in TEMPLATES:
        settings.comment(
            "data",
            f"chat_template {name}: the tokenizer's own template is used; if it has none, or another, save "
            f"axolotl's {name}.jinja and name it as template",
        )
    return TEMPLATES.get(name)
