"""The data of axolotl's YAML: how each `type` reads a row, and which chat template renders it."""

from collections.abc import Mapping
from typing import Any

from oumi_pl.convert import training
from oumi_pl.convert.settings import Keys, Settings
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

OWN_TYPE = "axolotl reads it within a type of your own alone"
DATASET_KEYS = Keys(
    "axolotl",
    {
        **dict.fromkeys(("path", "type", "name", "split", "data_files", "revision"), "a source"),
        **dict.fromkeys(("field", "text_column", "field_messages", "field_tools"), "columns"),
        **dict.fromkeys(("field_chosen", "field_rejected"), "columns"),
        **dict.fromkeys(("message_property_mappings", "message_field_role", "message_field_content"), "turns"),
        **dict.fromkeys(("message_field_training", "field_thinking", "template_thinking_key"), "turns"),
        **dict.fromkeys(("roles", "roles_to_train", "drop_system_message", "split_thinking"), "turns"),
        **dict.fromkeys(("train_on_eos", "train_on_eot"), "a comment"),
        **dict.fromkeys(("chat_template", "chat_template_jinja"), "data.template"),
        "skip": "a comment",
    },
    {
        "ds_type": "a file is read as its ending says",
        "preprocess_shards": "it decides on speed or memory alone",
        "trust_remote_code": "data sets with code of their own are not read",
        **dict.fromkeys(("conversation", "eval_max_length"), "axolotl does not read it"),
        **dict.fromkeys(("field_prompt", "field_completion", "field_label"), OWN_TYPE),
    },
    {
        **dict.fromkeys(
            ("shards", "shards_idx"), "a part of the shuffled rows has no counterpart; take rows by split or sample"
        ),
        "message_field_training_detail": "parts of a turn that are trained, by offsets, have no counterpart",
        **dict.fromkeys(
            ("input_format", "input_transform", "field_human", "field_model"), "it needs a format of your own"
        ),
        **dict.fromkeys(("logprobs_field", "temperature"), "it belongs to distillation, which has no counterpart"),
        **dict.fromkeys(
            ("step_separator", "max_completion_length", "train_on_last_step_only"),
            "this trainer type has no counterpart",
        ),
    },
)
"""What becomes of the keys of a data set."""


def data(settings: Settings, kind: str) -> tuple[str, dict[str, Any]]:
    """Trainer type and arguments of its data: text alone makes `SFT` a `Pretrain`.

    Raises:
        UserError: something has no counterpart.
    """
    pretraining = bool(settings.get("pretraining_dataset"))
    listed = _listed(settings, "pretraining_dataset")[:1] or _listed(settings, "datasets")
    if not listed:
        settings.refuse("datasets", "missing, so there is nothing to train on")
    texts = [pretraining or _type(one).partition(":")[0] in TEXTS for one in listed]
    kind = "Pretrain" if kind == "SFT" and all(texts) else kind
    args = _tokenizer(settings) | {"train": _unlisted([_source(settings, one, kind) for one in listed])}
    args |= _validation(settings, kind, args["train"])
    args["max_length"] = int(settings.noted("sequence_len", 512, "data.init_args.max_length"))
    if kind == "Pretrain":
        return kind, args | _documents(settings, streamed=pretraining) | _loading(settings)
    name = _template_name(settings, listed)
    args |= given(template=_template(settings, name), template_variables=settings.get("chat_template_kwargs"))
    args["overflow"] = _overflow(settings)
    return kind, args | _rows(settings, kind) | _loading(settings)


def _listed(settings: Settings, key: str) -> list[Settings]:
    """The settings of each data set."""
    value = settings.get(key) or []
    value = [value] if isinstance(value, str | Mapping) else value
    values = [{"path": one} if isinstance(one, str) else one for one in value]
    return [Settings(one, DATASET_KEYS, settings, f"{key}[{index}]") for index, one in enumerate(values)]


def _type(one: Settings, default: str = "None") -> str:
    return str(one.get("type") or default)


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


def _source(settings: Settings, one: Settings, kind: str) -> dict[str, Any]:
    path = str(one.get("path"))
    files = one.get("data_files")
    if files:
        files = files if isinstance(files, list) else [files]
        if path not in ("json", "csv", "parquet", "text", "arrow") or len(files) > 1:
            settings.comment(TRAIN, f"{path}: only its {', '.join(files)}: fetch it and name it as path")
        else:
            path = str(files[0])
    source = {"path": path} | given(config=one.get("name"), revision=one.get("revision"))
    source |= {"split": one.get("split")} if one.get("split", "train") != "train" else {}
    if skipped := one.get("skip", 0):
        settings.comment(
            TRAIN, f"{path}: skip {skipped}: the first documents are read too; leave them out with `where`"
        )
    return source | _READERS[kind](settings, one)


def _conversations(settings: Settings, one: Settings) -> dict[str, Any]:
    path = one.get("path")
    if isinstance(one.get("type"), Mapping):
        settings.refuse("datasets", f"{path}: a type of your own is a function here: write it, and name it as format")
    name = _type(one)
    if name in INSTRUCTIONS:
        settings.comment("data", "prompt and answer are tokenized as one text; axolotl tokenizes them apart")
        return {"format": f"{FORMATS}.{INSTRUCTIONS[name]}"}
    if name.partition(":")[0] in TEXTS:
        settings.comment(TRAIN, f"{path}: longer texts are left out; axolotl divides them")
        return {"format": "text"} | _renamed({"text": one.get("field", "text")})
    if name == "None":
        settings.refuse("datasets", f"{path}: rows without a type are token ids already; name their texts")
    if name not in CHATS:
        known = ", ".join((*INSTRUCTIONS, *CHATS[:1], *TEXTS))
        settings.refuse("datasets", f"{path}: type {name} has no counterpart (known: {known}); write it as a format")
    _check_turns(settings, one)
    column = one.get("field_messages", "conversations" if name == "sharegpt" else "messages")
    tools = one.get("field_tools", "tools")
    if one.get("drop_system_message"):
        return {"format": f"{FORMATS}.without_system"} | _renamed({"messages": column, "tools": tools})
    if column == "conversations":
        return {"format": "sharegpt"} | _renamed({"tools": tools})
    return {"format": "messages"} | _renamed({"messages": column, "tools": tools})


ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "function": "tool", "observation": "tool"}
"""Name of a role -> the one that is read here; others keep theirs."""
PROPERTIES = {"role": ("role", "from"), "content": ("content", "value")}


THOUGHTS = "reasoning_content"


def _check_turns(settings: Settings, one: Settings) -> None:
    """Refuses keys of turns and roles that are read otherwise here."""
    path = one.get("path")
    mapping = dict(one.get("message_property_mappings") or {})
    if not mapping:  # only then, thoughts have keys of their own
        mapping = {one.get("template_thinking_key", THOUGHTS): one.get("field_thinking", THOUGHTS)}
    former = {name: one.get(f"message_field_{name}") for name in ("role", "content")}
    mapping |= {name: key for name, key in former.items() if key is not None}
    for name, key in mapping.items():
        if key not in PROPERTIES.get(name, (name,)):
            settings.refuse("datasets", f"{path}: turns with {name} in {key!r} need a format of your own")
    for target, names in dict(one.get("roles") or {}).items():
        if any(ROLES.get(role, role) != target for role in names):
            settings.refuse("datasets", f"{path}: roles {names} as {target!r} need a format of your own")
    trained = {ROLES.get(role, role) for role in one.get("roles_to_train") or ["assistant"]}
    if trained != {"assistant"}:
        settings.refuse("datasets", f"{path}: roles_to_train {sorted(trained)}: only the assistant's turns are")
    for key in ("train_on_eos", "train_on_eot"):
        if one.get(key, "turn") != "turn":
            settings.comment(
                "data.init_args.train_on", f"{key}: {one.get(key)}: the end of each trained turn is trained here"
            )
    if (key := one.get("message_field_training", "train")) not in ("weight", "loss", "train", "training", "masked"):
        settings.refuse("datasets", f"{path}: rename {key!r} in turns to `train`")
    if one.get("split_thinking"):
        settings.comment("data", f"{path}: split_thinking: thoughts in the text of a turn are left to the template")


def _documents_source(settings: Settings, one: Settings) -> dict[str, Any]:
    if _type(one, "pretrain").partition(":")[0] not in (*TEXTS, "c4"):
        settings.refuse("datasets", f"{one.get('path')}: type {_type(one)} of texts has no counterpart")
    return _renamed({"text": one.get("field", one.get("text_column", "text"))})


def _pairs(settings: Settings, one: Settings) -> dict[str, Any]:
    name = _type(one, "passthrough")
    base, _, end = name.rpartition(".")
    if name == "passthrough":
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
        settings.refuse("datasets", f"{one.get('path')}: type {name} has no counterpart; write it as a format")
    shape = {"format": "question_preference"} if end in QUESTIONS else {}
    return shape | _renamed(PAIRS[end])


def _feedback(settings: Settings, one: Settings) -> dict[str, Any]:
    name = _type(one)
    base, _, end = name.rpartition(".")
    if base not in ("chatml", "llama3") or end not in FEEDBACK:
        settings.refuse("datasets", f"{one.get('path')}: type {name} has no counterpart; write it as a format")
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
    in_order = [settings.get(name) for name in ("curriculum_sampling", "sample_packing_sequentially")]
    if settings.get("shuffle_merged_datasets") is False or any(in_order):
        settings.comment(TRAIN, "rows are shuffled; axolotl takes them in order")
    if settings.get("min_sample_len"):
        settings.comment(TRAIN, f"min_sample_len {settings.get('min_sample_len')}: short rows are kept; use `where`")
    if settings.get("streaming"):
        settings.comment(TRAIN, "rows are read and tokenized before training, and not streamed")
    if kind != "SFT":
        return section | training.by_length(settings, kind)
    section |= given(train_on="all" if settings.get("train_on_inputs") else None)
    packed = settings.get("sample_packing")
    return section | ({"packing": True} if packed else training.by_length(settings, kind))


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
    section: dict[str, Any] = {"packing": "best_fit", "isolate": True}
    if settings.has("sample_packing") and not settings.get("sample_packing"):
        settings.comment("data", "sample_packing: documents are packed in any case")
    if not streamed:
        return section | _rows(settings, "Pretrain")
    if int(settings.get("max_steps", -1)) <= 0:
        settings.refuse("max_steps", "missing: data that are streamed have no known end")
    section["isolate"] = settings.get("pretrain_multipack_attn") is not False
    is_shuffled = settings.get("shuffle_merged_datasets") is not False
    buffer = int(settings.get("streaming_multipack_buffer_size", 10_000)) if is_shuffled else 0
    return section | {"streaming": True, "shuffle_buffer": buffer, "exhausted": "restart"}


# --- the template -----------------------------------------------------------------------------------------------------


TOKENIZERS = "tokenizer_default"
Template = tuple[str, str | None]
"""axolotl's name of a template, and its text or file if that is `jinja`."""


def _template_name(settings: Settings, listed: list[Settings]) -> Template | None:
    """The template that renders the rows; None if none does."""
    chats = [one for one in listed if _type(one) not in INSTRUCTIONS and _type(one).partition(":")[0] not in TEXTS]
    if not chats:
        for key in ("chat_template", "chat_template_jinja"):
            if settings.has(key):
                settings.became_nothing(key, "there are no turns that it would render")
        return None
    of_all = _named(settings)
    named = {_named(one) or of_all or (_in_type(_type(one)) or TOKENIZERS, None) for one in chats}
    if len(named) > 1:
        names = sorted(jinja or name for name, jinja in named)
        settings.refuse("chat_template", f"{', '.join(names)}: all rows have one template here")
    return next(iter(named), None)


def _named(settings: Settings) -> Template | None:
    """The template that the config or a data set names; None for the tokenizer's, which the config's replaces."""
    name = settings.get("chat_template")
    if name is None and settings.has("chat_template_jinja"):
        if settings.place and _type(settings) == "chat_template":  # for which axolotl fills in the tokenizer's first
            settings.became_nothing("chat_template_jinja", "axolotl reads it beside `chat_template: jinja` alone")
            return None
        name = "jinja"
    if name in (None, TOKENIZERS):
        return None
    return str(name), str(settings.get("chat_template_jinja", "")) if name == "jinja" else None


def _in_type(kind: str) -> str | None:
    base = kind.partition(".")[0]
    return base if base in ("chatml", "llama3") else None


def _template(settings: Settings, named: Template | None) -> str | None:
    if named is None:
        return None
    name, jinja = named
    if jinja is not None:
        if not jinja.endswith((".jinja", ".jinja2")):
            settings.refuse("chat_template_jinja", "save the template to a .jinja file, and name that")
        return jinja
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
