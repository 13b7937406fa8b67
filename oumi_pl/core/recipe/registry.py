"""The datasets that Oumi registers by name, and how their rows are read here."""

from collections.abc import Mapping
from typing import Any, NamedTuple

FORMATS = "oumi_pl.core.recipe.formats"


class Registered(NamedTuple):
    """A registered dataset.

    kind: what its rows are: `chat`, `pair` or `document`. format: of the source; found from the columns if None.
    columns: of the source. kwargs: what `dataset_kwargs` may hold besides `ANY` and those of its kind. path: id on the
    hub, where that is not the name it is registered by; empty where `dataset_path` or a keyword has to say.
    """

    kind: str
    format: str | None = None
    columns: Mapping[str, str] = {}
    kwargs: tuple[str, ...] = ()
    path: str | None = None


ANY = ("dataset_name_override",)
OF_KIND = {
    "chat": ("task", "return_tensors", "text_col", "assistant_only", "response_template", "instruction_template",
             "return_conversations"),
    "pair": ("return_tensors",),
    "document": ("seq_length", "dataset_text_field", "append_concat_token", "add_special_tokens", "skip_last"),
}  # fmt: skip
"""Kind of dataset -> what `dataset_kwargs` may hold for all of them."""

_ALPACA = Registered("chat", f"{FORMATS}.alpaca", kwargs=("include_system_prompt",))
_QUESTIONS = Registered("chat", "prompt_response", {"prompt": "instruction", "response": "output"})
_TEXT_SFT = Registered("chat", f"{FORMATS}.text_sft", kwargs=("format",), path="")
_MAGPIE = Registered("chat", "sharegpt")
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
    "argilla/magpie-ultra-v0.1": _QUESTIONS._replace(columns={"prompt": "instruction", "response": "response"}),
    "cohereforai/aya_dataset": _QUESTIONS._replace(columns={"prompt": "inputs", "response": "targets"}),
    "huggingfacedataset": Registered(
        "chat", "messages", kwargs=("hf_dataset_path", "messages_column", "exclude_final_assistant_message")
    ),
    "huggingfaceh4/ultrachat_200k": Registered("chat", "messages"),
    "allenai/tulu-3-sft-mixture": Registered("chat", "messages"),
    "allenai/wildchat-1m": Registered("chat", "messages", {"messages": "conversation"}),
    "magpie-align/llama-3-magpie-pro-1m-v0.1": _MAGPIE,
    "magpie-align/magpie-pro-300k-filtered": _MAGPIE,
    "argilla/databricks-dolly-15k-curated-en": Registered("chat", f"{FORMATS}.dolly", kwargs=("use_new_fields",)),
    "text_sft": _TEXT_SFT,
    "text_sft_jsonl": _TEXT_SFT,
    "mlabonne/orpo-dpo-mix-40k": Registered("pair", f"{FORMATS}.turns_preference"),
    "text_dpo_jsonl": Registered("pair", "prompt_preference", path=""),
    **{name.lower(): _DOCUMENTS._replace(path=name) for name in _DOCUMENT_SETS},
}
"""Name in lower case, as Oumi compares it -> how its rows are read."""

NOT_READ = {
    "nvidia/chatqa-training-data": "its system turns differ from subset to subset",
    "nvidia/chatrag-bench": "its turns are put together from documents",
    **dict.fromkeys(("debug_sft", "debug_pretraining", "debug_dpo", "debug_classfication"), "it is made up for tests"),
}
"""Registered names without a counterpart, and why."""

VISION = frozenset(
    [
        "merve/vqav2-small",
        "hf_vision",
        "vl_sft",
        "vision_language_jsonl",
        "vision_dpo_jsonl",
        "openbmb/rlaif-v-dataset",
        "huggingfaceh4/llava-instruct-mix-vsft",
        "coco_captions",
        "nlphuji/flickr30k",
        "huggingfacem4/the_cauldron",
        "huggingfacem4/docmatix",
        "allenai/pixmo-cap",
        "allenai/pixmo-ask-model-anything",
        "allenai/pixmo-cap-qa",
        "ylecun/mnist",
        "lmms-lab/multimodal-open-r1-8k-verified",
        "hiyouga/geometry3k",
    ]
)
"""Registered names of data with images."""

VISION_KWARGS = ("processor_name", "processor_kwargs", "image_column", "question_column", "answer_column", "limit")
"""Keys of `dataset_kwargs` that only data with images have."""


def registered(name: str) -> Registered | None:
    """How Oumi reads a dataset of this name; None if it doesn't know it, and takes it for one of the hub."""
    return REGISTERED.get(name.lower())


def known_kwargs(entry: Registered) -> tuple[Any, ...]:
    """Keys that `dataset_kwargs` may hold for a registered dataset."""
    return (*ANY, *OF_KIND[entry.kind], *entry.kwargs)
