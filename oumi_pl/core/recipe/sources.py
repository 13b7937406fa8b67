"""Datasets of an Oumi config as sources of a recipe: those that Oumi registers by name, and those of the hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from oumi_pl.core.configs import DatasetParams, ModelParams
from oumi_pl.core.recipe.custom import base_of, hub_path, registered_class, rows_file
from oumi_pl.core.recipe.files import hub_file
from oumi_pl.core.recipe.notes import Notes, given, refuse
from oumi_pl.errors import nearest

FORMATS = "oumi_pl.core.recipe.formats"


class Registered(NamedTuple):
    """A registered dataset.

    kind: what its rows are: `chat`, `pair`, `feedback`, `prompt` or `document`. format: of the source; found from the
    columns if None. columns: of the source. kwargs: what `dataset_kwargs` may hold besides `ANY` and those of its kind.
    path: id on the hub, where that is not the name it is registered by; empty where `dataset_path` or a keyword has to
    say. subset: the one that is read where the config names none. cls: the class that the user registered.
    """

    kind: str
    format: str | None = None
    columns: Mapping[str, str] = {}
    kwargs: tuple[str, ...] = ()
    path: str | None = None
    subset: str | None = None
    cls: Any = None


ANY = ("dataset_name_override",)
OF_KIND = {
    "chat": ("task", "return_tensors", "text_col", "assistant_only", "response_template", "instruction_template",
             "return_conversations", "return_conversations_format"),
    "pair": ("return_tensors",),
    "feedback": ("return_tensors",),
    "prompt": ("return_conversations",),
    "document": ("seq_length", "dataset_text_field", "append_concat_token", "add_special_tokens", "skip_last"),
}  # fmt: skip
"""Kind of dataset -> what `dataset_kwargs` may hold for all of them."""

_ALPACA = Registered("chat", f"{FORMATS}.alpaca", kwargs=("include_system_prompt",))
_QUESTIONS = Registered("chat", f"{FORMATS}.prompt_response", {"prompt": "instruction", "response": "output"})
_QUESTIONS_OR_NOTHING = Registered("chat", f"{FORMATS}.prompt_response_or_nothing")
_MESSAGES = Registered("chat", f"{FORMATS}.messages")
_TEXT_SFT = Registered("chat", f"{FORMATS}.text_sft", kwargs=("format",), path="")
_MAGPIE = Registered("chat", f"{FORMATS}.sharegpt")
_LETTERS = Registered("prompt", f"{FORMATS}.letter_count")
_DOCUMENTS = Registered("document")
_DOCUMENT_SETS = [
    "allenai/c4", "allenai/dolma", "bigcode/starcoderdata", "bigcode/the-stack", "cerebras/slimpajama-627b",
    "eleutherai/pile", "gmongaras/slimpajama-627b_reupload", "HuggingFaceFW/fineweb-edu", "nampdn-ai/tiny-textbooks",
    "pleias/youtube-commons", "roneneldan/tinystories", "salesforce/wikitext", "tiiuae/falcon-refinedweb",
    "togethercomputer/redpajama-data-1t", "togethercomputer/redpajama-data-v2", "wikimedia/wikipedia",
]  # fmt: skip

REGISTERED: dict[str, Registered] = {
    "yahma/alpaca-cleaned": _ALPACA,
    "tatsu-lab/alpaca": _ALPACA,
    "uiuc-convai/coalm-it": _ALPACA,
    "promptresponsedataset": _QUESTIONS._replace(kwargs=("hf_dataset_path", "prompt_column", "response_column")),
    "o1-open/openo1-sft": _QUESTIONS,
    "argilla/magpie-ultra-v0.1": _QUESTIONS_OR_NOTHING._replace(columns={"prompt": "instruction"}),
    "cohereforai/aya_dataset": _QUESTIONS_OR_NOTHING._replace(columns={"prompt": "inputs", "response": "targets"}),
    "huggingfacedataset": Registered(
        "chat",
        f"{FORMATS}.messages_or_nothing",
        kwargs=("hf_dataset_path", "messages_column", "exclude_final_assistant_message"),
    ),
    "huggingfaceh4/ultrachat_200k": _MESSAGES,
    "allenai/tulu-3-sft-mixture": _MESSAGES,
    "allenai/wildchat-1m": _MESSAGES._replace(columns={"messages": "conversation"}),
    "magpie-align/llama-3-magpie-pro-1m-v0.1": _MAGPIE,
    "magpie-align/magpie-pro-300k-filtered": _MAGPIE,
    "argilla/databricks-dolly-15k-curated-en": Registered("chat", f"{FORMATS}.dolly", kwargs=("use_new_fields",)),
    "text_sft": _TEXT_SFT,
    "text_sft_jsonl": _TEXT_SFT,
    "mlabonne/orpo-dpo-mix-40k": Registered("pair", f"{FORMATS}.turns_preference"),
    "nvidia/chatqa-training-data": Registered("chat", f"{FORMATS}.chatqa", subset="sft"),
    "trl-lib/kto-mix-14k": Registered("feedback"),
    "trl-lib/tldr": Registered("prompt", f"{FORMATS}.prompt"),
    "d1shs0ap/countdown": Registered("prompt", f"{FORMATS}.countdown"),
    "openai/gsm8k": Registered("prompt", f"{FORMATS}.gsm8k"),
    "oumi-ai/oumi-letter-count": _LETTERS,
    "oumi-ai/oumi-letter-count-clean": _LETTERS,
    "oumi-ai/berrybench-v0.1.1": Registered("prompt", f"{FORMATS}.berry_bench"),
    "text_dpo_jsonl": Registered("pair", "prompt_preference", path=""),
    **{name.lower(): _DOCUMENTS._replace(path=name) for name in _DOCUMENT_SETS},
}
"""Name in lower case, as Oumi compares it -> how its rows are read."""

NOT_READ = {
    "nvidia/chatrag-bench": "its turns are put together from documents",
    **dict.fromkeys(("debug_sft", "debug_pretraining", "debug_dpo", "debug_classfication"), "it is made up for tests"),
}
"""Registered names without a counterpart, and why."""

CHATQA = {
    "sft": "chatqa",
    "synthetic_convqa": "chatqa_full",
    "tatqa": "chatqa_number",
    "tatqa-arithmetic": "chatqa_number",
    "tatqa-others": "chatqa_span",
    **dict.fromkeys(("drop", "narrativeqa", "quoref", "ropes", "squad1.1", "squad2.0", "newsqa"), "chatqa_short"),
}
"""Subset of ChatQA -> the function that reads its rows."""
CHATQA_FILES = {"tatqa-arithmetic": "tatqa/train_arithmetic.json", "tatqa-others": "tatqa/train_others.json"}
"""Subset of ChatQA that is no configuration on the hub -> its file there."""

VISION = (
    "merve/vqav2-small", "hf_vision", "vl_sft", "vision_language_jsonl", "vision_dpo_jsonl",
    "openbmb/rlaif-v-dataset", "huggingfaceh4/llava-instruct-mix-vsft", "coco_captions", "nlphuji/flickr30k",
    "huggingfacem4/the_cauldron", "huggingfacem4/docmatix", "allenai/pixmo-cap", "allenai/pixmo-ask-model-anything",
    "allenai/pixmo-cap-qa", "ylecun/mnist", "lmms-lab/multimodal-open-r1-8k-verified", "hiyouga/geometry3k",
)  # fmt: skip
"""Registered names of data with images."""

VISION_KWARGS = ("processor_name", "processor_kwargs", "image_column", "question_column", "answer_column", "limit")
"""Keys of `dataset_kwargs` that only data with images have."""

OWN_FORMATS = {"chat": f"{FORMATS}.messages", "pair": f"{FORMATS}.turns_preference", "prompt": f"{FORMATS}.prompt"}
"""Kind of the user's own data sets -> how the rows that they give are read."""

RAW = Registered("raw", kwargs=OF_KIND["chat"])
READ = (".jsonl", ".json", ".parquet")


def entry_of(dataset: DatasetParams, place: str) -> Registered:
    """How Oumi reads a dataset; of kind `raw` if it only knows the hub's name of it.

    Raises:
        UserError: it has images, or rows that can't be read here.
    """
    name = dataset.dataset_name
    if "://" in name:
        refuse(f"{place}.dataset_name", f"{name!r} is an address; download it, and name the file as dataset_path")
    if (cls := registered_class(dataset)) is not None:
        kind = base_of(cls, place).kind
        return Registered(kind, OWN_FORMATS.get(kind), cls=cls)
    for key in VISION_KWARGS:
        if key in dataset.dataset_kwargs:
            refuse(f"{place}.dataset_kwargs.{key}", "is for images, and images are not trained on")
    if name.lower() in VISION:
        refuse(f"{place}.dataset_name", f"{name!r} has images, and images are not trained on")
    if why := NOT_READ.get(name.lower()):
        refuse(f"{place}.dataset_name", f"{name!r} has no counterpart: {why}; prepare its rows as text_sft_jsonl")
    return REGISTERED.get(name.lower(), RAW)


def source(
    dataset: DatasetParams,
    place: str,
    notes: Notes,
    seed: int,
    text_field: str | None = None,
    *,
    conversations: bool = False,
    model: ModelParams | None = None,
) -> str | dict[str, Any] | None:
    """The source of a dataset; None if its share in the mixture is 0.

    Args:
        dataset: The dataset.
        place: Its path in the config.
        notes: Where comments go.
        seed: Of the run, where the dataset has none.
        text_field: Column of the text, of data that Oumi doesn't register.
        conversations: Whether the trainer type reads conversations, and not token ids.
        model: The model, whose tokenizer a data set of the user's gets.

    Raises:
        UserError: it has images, options without a counterpart, or no rows that can be found.
    """
    entry = entry_of(dataset, place)
    if entry.cls is None:
        _check_kwargs(dataset, entry, place, conversations=conversations)
    if dataset.mixture_proportion == 0:
        notes.became[f"{place}.mixture_proportion"] = "the source is left out"
        return None
    if entry.cls is not None:
        return _own(dataset, entry, place, notes, seed, model=model)
    path, split = _path(dataset, entry, place, notes), dataset.split
    local_file = dataset.dataset_path is not None and Path(dataset.dataset_path).suffix != ""
    if local_file:
        # Oumi reads a file as a whole whatever the split; a slice is what was meant by one
        if "[" in split:
            refuse(f"{place}.split", f"{split!r}: Oumi reads a file as a whole; say sample_count for fewer rows")
        notes.nothing(f"{place}.split", "a file has one split, and is read as a whole")
    is_file = entry.format == f"{FORMATS}.chatqa" and dataset.subset in CHATQA_FILES
    tree = given(
        path=path,
        config=None if is_file else dataset.subset or (entry.subset if dataset.dataset_path is None else None),
        split=None if local_file or split == "train" else split,
        format=_format(dataset, entry, place),
        columns=_columns(dataset, entry, text_field),
        weight=dataset.mixture_proportion,
        **_sample(dataset, place, seed),
    )
    if "sample_seed" not in tree:
        notes.nothing(f"{place}.seed", "no rows are drawn; the seed of the run decides on their order")
        notes.nothing(f"{place}.shuffle", "the run draws an order of its own for each epoch")
    notes.became[f"{place}.dataset_name"] = ", ".join(f"{key} {value}" for key, value in tree.items())
    return tree["path"] if set(tree) == {"path"} else tree


def _own(
    dataset: DatasetParams, entry: Registered, place: str, notes: Notes, seed: int, *, model: ModelParams | None
) -> dict[str, Any]:
    """The source of a data set that the user registered."""
    path = hub_path(dataset, entry.cls, place) if entry.kind == "document" else None
    where: dict[str, Any]
    if path is None:
        where = {"path": rows_file(dataset, entry.cls, place, notes, model), "name": dataset.dataset_name}
    else:
        text = dataset.dataset_kwargs.get("dataset_text_field", "text")
        where = {"path": path, "config": dataset.subset or entry.cls.default_subset}
        where |= {"split": dataset.split} if dataset.split != "train" else {}
        where |= {"columns": {"text": text}} if text != "text" else {}
    tree = given(**where, format=entry.format, weight=dataset.mixture_proportion, **_sample(dataset, place, seed))
    if "sample_seed" not in tree:
        notes.nothing(f"{place}.shuffle", "the run draws an order of its own for each epoch")
    for key in dataset.dataset_kwargs:
        notes.became[f"{place}.dataset_kwargs.{key}"] = f"an argument of {entry.cls.__name__}"
    notes.became[f"{place}.dataset_name"] = f"the rows of {entry.cls.__name__}, which is registered by this name"
    return tree


def _path(dataset: DatasetParams, entry: Registered, place: str, notes: Notes) -> str:
    kwargs = dataset.dataset_kwargs
    if dataset.dataset_path is not None:
        path = Path(dataset.dataset_path)
        if path.suffix == ".xlsx":
            refuse(f"{place}.dataset_path", f"{path}: spreadsheets are not read; save it as .jsonl or .parquet")
        if entry is RAW and path.suffix:
            why = f"Oumi ignores it for {dataset.dataset_name!r}, which it doesn't know"
            refuse(f"{place}.dataset_path", f"{why}; name text_sft_jsonl, or text_dpo_jsonl, as dataset_name")
        if path.suffix and path.suffix not in READ:
            refuse(f"{place}.dataset_path", f"{path}: Oumi reads {', '.join(READ)} and folders of save_to_disk")
        if dataset.subset is not None:
            refuse(f"{place}.subset", "is for data from the hub, and dataset_path is local; leave it out")
        notes.became[f"{place}.dataset_path"] = "path"
        return str(dataset.dataset_path)
    if entry.format == f"{FORMATS}.chatqa" and dataset.subset in CHATQA_FILES:
        return _chatqa_file(dataset, place, notes)
    if "hf_dataset_path" in entry.kwargs:
        if not kwargs.get("hf_dataset_path"):
            refuse(f"{place}.dataset_kwargs.hf_dataset_path", "missing: the data set on the hub, or dataset_path")
        return str(kwargs["hf_dataset_path"])
    if entry.path == "":
        refuse(f"{place}.dataset_path", f"missing: {dataset.dataset_name} reads a local file")
    return str(kwargs.get("dataset_name_override") or entry.path or dataset.dataset_name)


def _format(dataset: DatasetParams, entry: Registered, place: str) -> str | None:
    kwargs = dataset.dataset_kwargs
    if not kwargs.get("include_system_prompt", True):
        return f"{FORMATS}.alpaca_without_system"
    if not kwargs.get("use_new_fields", True):
        return f"{FORMATS}.dolly_original"
    if kwargs.get("exclude_final_assistant_message"):
        return f"{FORMATS}.without_final_answer"
    if kwargs.get("format") not in (None, "oumi", "alpaca"):
        refuse(f"{place}.dataset_kwargs.format", f"unknown {kwargs['format']!r}; known: oumi, alpaca")
    if "response_column" in entry.kwargs and not kwargs.get("response_column", True):
        return f"{FORMATS}.prompt_alone"
    return _chatqa(dataset, place) if entry.format == f"{FORMATS}.chatqa" else entry.format


def _chatqa(dataset: DatasetParams, place: str) -> str:
    """The format of a subset of ChatQA."""
    subset = dataset.subset or "sft"
    if subset not in CHATQA:
        refuse(f"{place}.subset", f"ChatQA has no subset {subset!r}{nearest(subset, CHATQA)}")
    return f"{FORMATS}.{CHATQA[subset]}"


def _chatqa_file(dataset: DatasetParams, place: str, notes: Notes) -> str:
    """The file of a subset of ChatQA, in the hub's cache; fetched if files may be."""
    repository, name = dataset.dataset_name, CHATQA_FILES[str(dataset.subset)]
    path = hub_file(repository, name, kind="dataset", online=notes.online)
    if path is None:
        remedy = f"fetch it: hf download {repository} {name} --repo-type dataset"
        refuse(f"{place}.subset", f"{dataset.subset} is one file of the data set, and not in the cache; {remedy}")
    return str(path)


def _columns(dataset: DatasetParams, entry: Registered, text_field: str | None) -> dict[str, str]:
    kwargs = dataset.dataset_kwargs
    named = {"prompt": "prompt_column", "response": "response_column", "messages": "messages_column"}
    named |= {"text": "dataset_text_field"}
    given = {ours: kwargs[key] for ours, key in named.items() if kwargs.get(key)}
    if entry is RAW and text_field is not None:
        given["text"] = text_field
    columns = {**entry.columns, **given}
    if not kwargs.get("response_column", True):
        columns.pop("response", None)
    return {ours: theirs for ours, theirs in columns.items() if ours != theirs}


def _sample(dataset: DatasetParams, place: str, seed: int) -> dict[str, Any]:
    if dataset.sample_count is None:
        return {}
    if dataset.sample_count == 0:
        refuse(f"{place}.sample_count", "is 0, so there is nothing to read; leave the dataset out")
    if not dataset.shuffle:
        return {"sample": dataset.sample_count}
    return {"sample": dataset.sample_count, "sample_seed": seed if dataset.seed is None else dataset.seed}


def _check_kwargs(dataset: DatasetParams, entry: Registered, place: str, *, conversations: bool) -> None:
    known = (*ANY, *entry.kwargs, *(() if entry is RAW else OF_KIND[entry.kind]))
    expected = {
        "task": ("sft",),
        "return_conversations": (True,) if conversations else (False, None),
        "return_conversations_format": ("dict",) if conversations else (None,),
        "append_concat_token": (True,),
        "add_special_tokens": (True,),
    }
    needed = ("return_conversations", "return_conversations_format") if conversations and entry is not RAW else ()
    for key in needed:
        if key not in dataset.dataset_kwargs:
            value = str(expected[key][0]).lower()
            refuse(f"{place}.dataset_kwargs.{key}", f"missing: TRL_GKD reads conversations; set it to {value}")
    for key, value in dataset.dataset_kwargs.items():
        if key not in known:
            why = f"{dataset.dataset_name} is read without it{nearest(key, known)}"
            refuse(f"{place}.dataset_kwargs.{key}", f"has no counterpart: {why}")
        if key in expected and value not in expected[key]:
            words = " or ".join(str(one).lower() for one in expected[key] if one is not None) or "null"
            refuse(f"{place}.dataset_kwargs.{key}", f"{value!r} has no counterpart; the only value is {words}")
