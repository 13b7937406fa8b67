"""The data of an Oumi config: sources, which tokens carry loss, how rows are cut, joined and put in order."""

import os
from typing import Any

from oumi_pl.core.configs import DatasetSplitParams, TrainingConfig
from oumi_pl.core.recipe.distillation import alternating
from oumi_pl.core.recipe.notes import Notes, given, refuse
from oumi_pl.core.recipe.sources import FORMATS, Registered, entry_of, source
from oumi_pl.core.recipe.targets import COMPLETIONS, PADDING, refuse_collators, template, train_on
from oumi_pl.core.recipe.trainer_kwargs import FORMER_LENGTH

EVALUATION = ("training.per_device_eval_batch_size", "training.eval_steps")
TRL_LENGTH = 1024
"""Where TRL cuts rows by default; also the window of `pack`."""
PACKED_CHAT = "oumi_pl.data.packed_chat.PackedChatData"
DEFAULT = "oumi/default"
ADD_BOS = (DEFAULT, "oumi/phi3-instruct", "oumi/gpt2", "oumi/zephyr")
"""Templates that don't write BOS themselves."""


READS: dict[str, tuple[str, set[str], str]] = {
    "DPO": ("DPO", {"pair"}, "pairs of responses, e.g. text_dpo_jsonl, and these have none"),
    "KTO": ("KTO", {"feedback"}, "responses with a label, e.g. trl-lib/kto-mix-14k, unlike these"),
    "GRPO": ("GRPO", {"prompt"}, "prompts, e.g. openai/gsm8k, and these are something else"),
    "GKD": ("Distill", {"chat"}, "conversations, and these are something else"),
}
"""End of a trainer type -> module, the kinds of data that it reads, and what they are."""
FOR = {
    "pair": "pairs of responses, which TRL_DPO trains on",
    "feedback": "responses with a label, which TRL_KTO trains on",
    "prompt": "prompts, which TRL_GRPO and VERL_GRPO train on",
}
"""Kind of data -> what it is for."""


def kind(config: TrainingConfig, notes: Notes) -> str:
    """`SFT`, `DPO`, `KTO`, `Distill`, `GRPO` or `Pretrain`, by the trainer type and the data.

    Raises:
        UserError: the data are not for this trainer type, or can't be mixed.
    """
    split = config.data.train
    if not split.datasets:
        refuse("data.train.datasets", "is empty, so there is nothing to train on")
    kinds = {entry.kind for entry in _entries(split)}
    name = config.training.trainer_type.name
    if len(kinds - {"raw"}) > 1 or ("document" in kinds and len(kinds) > 1):
        refuse("data.train.datasets", f"{' and '.join(sorted(kinds))} data can't be mixed; keep one kind")
    module, kinds_read, what = next(
        (reads for ending, reads in READS.items() if name.endswith(ending)), ("SFT", {"chat", "document"}, "")
    )
    if what and kinds - kinds_read - {"raw"}:
        refuse("data.train.datasets", f"{name} reads {what}")
    for other in kinds & set(FOR) - kinds_read:
        refuse("data.train.datasets", f"these are {FOR[other]}, and not {name}")
    if what:
        return module
    if "document" in kinds or split.pack or name == "PRETRAIN":
        module = "Pretrain"
    notes.became["training.trainer_type"] = f"model.class_path {module}"
    return module


def refuse_images(config: TrainingConfig) -> None:
    """Refuses data with images by that reason, before whatever else such a config says.

    Raises:
        UserError: a dataset or a collator is for images.
    """
    for name in ("train", "validation"):
        split: DatasetSplitParams = getattr(config.data, name)
        for number, dataset in enumerate(split.datasets):
            entry_of(dataset, f"data.{name}.datasets[{number}]")
        if (split.collator_name or "").startswith("vision"):
            refuse(f"data.{name}.collator_name", f"{split.collator_name} is for images, and images are not trained on")


def data(config: TrainingConfig, kind: str, notes: Notes) -> dict[str, Any]:
    """The section `data`.

    Raises:
        UserError: something has no counterpart.
    """
    sections = {"DPO": _pairs, "KTO": _feedback, "Pretrain": _documents, "SFT": _conversations, "GRPO": _prompts}
    sections["Distill"] = _last_turns
    return sections[kind](config, notes)


def _conversations(config: TrainingConfig, notes: Notes) -> dict[str, Any]:
    split = config.data.train
    refuse_collators(split, "data.train", (None, COMPLETIONS, PADDING))
    args = _common(config, notes) | _template(config, notes)
    entries = _entries(split)
    args["train_on"] = train_on(config, entries, notes)
    args |= {"max_length": _max_length(config, notes), "overflow": "keep_start"}
    kwargs, raw = config.training.trainer_kwargs, all(entry.kind == "raw" for entry in entries)
    args |= {"packing": True} if kwargs.get("packing") and raw else {"group_by_length": False}
    for key in ("packing", "dataset_text_field", "assistant_only_loss", "completion_only_loss"):
        if key in kwargs and not raw:
            notes.became[f"training.trainer_kwargs.{key}"] = "nothing: TRL reads it of rows that Oumi doesn't tokenize"
    if split.stream:
        notes.nothing("data.train.stream", "conversations are read before training")
        notes.comment("data.init_args.train", "rows are read and tokenized before training, and not streamed")
    return {"class_path": "SFTData", "init_args": args | _loading(config)}


def _pairs(config: TrainingConfig, notes: Notes) -> dict[str, Any]:
    split = config.data.train
    refuse_collators(split, "data.train", (None,))
    if split.pack:
        refuse("data.train.pack", "pairs of responses are not packed; leave it out")
    args = _common(config, notes) | _template(config, notes)
    args |= {"max_length": _max_length(config, notes), "overflow": "keep_start"}
    if any(entry.kind == "pair" for entry in _entries(split)):
        notes.comment(
            "data",
            "Oumi tokenizes prompt and responses apart, counts the assistant's header as part of the responses (the "
            "loss is the same, logged rewards are not) and ends them with EOS twice where the template writes it; "
            "here each pair is rendered whole, a prompt that both responses repeat is there once, and pairs of equal "
            "responses, which teach nothing, are left out",
        )
    return {"class_path": "DPOData", "init_args": args | _loading(config)}


def _feedback(config: TrainingConfig, notes: Notes) -> dict[str, Any]:
    split = config.data.train
    refuse_collators(split, "data.train", (None,))
    if split.pack:
        refuse("data.train.pack", "responses with a label are not packed in Oumi; leave it out")
    args = _common(config, notes) | _template(config, notes)
    args |= {"max_length": _max_length(config, notes), "overflow": "keep_start"}
    notes.comment(
        "data",
        "the KL divergence is estimated on each prompt with the response to another prompt, which is the same one in "
        "all of a run; Oumi takes it from the micro-batch",
    )
    return {"class_path": "KTOData", "init_args": args | _loading(config)}


def _prompts(config: TrainingConfig, notes: Notes) -> dict[str, Any]:
    """What `recipe.grpo` doesn't say: sources and template."""
    split = config.data.train
    refuse_collators(split, "data.train", (None,))
    if split.pack:
        refuse("data.train.pack", "prompts are not packed; leave it out")
    if split.stream:
        notes.nothing("data.train.stream", "prompts are read before training")
    args = _common(config, notes) | _template(config, notes) | _loading(config)
    for name in ("train", "validation"):
        if name in args:
            sources = args[name] if isinstance(args[name], list) else [args[name]]
            read = [_as_prompts(source) for source in sources]
            args[name] = read if isinstance(args[name], list) else read[0]
    return {"class_path": "RolloutData", "init_args": args}


def _as_prompts(source: str | dict[str, Any]) -> dict[str, Any]:
    """A source whose `prompt` is not rendered if it is text, as in TRL."""
    tree = {"path": source} if isinstance(source, str) else source
    return {"format": f"{FORMATS}.prompt"} | tree


def _last_turns(config: TrainingConfig, notes: Notes) -> dict[str, Any]:
    split = config.data.train
    refuse_collators(split, "data.train", (None,))
    if split.pack:
        refuse("data.train.pack", "TRL_GKD does not pack; leave it out")
    args = _common(config, notes) | _template(config, notes)
    args |= {"max_length": _max_length(config, notes), "group_by_length": False}
    sampled = alternating(config, notes)
    args |= sampled or {"train_on": "last_turn"}
    notes.comment(
        "data.init_args" if sampled else "data.init_args.train_on",
        "the last turn is trained as in TRL, which also trains what the template writes after its end",
    )
    return {"class_path": "DistillData" if sampled else "SFTData", "init_args": args | _loading(config)}


def _documents(config: TrainingConfig, notes: Notes) -> dict[str, Any]:
    split = config.data.train
    refuse_collators(split, "data.train", (None, COMPLETIONS, PADDING) if split.pack else (None, PADDING))
    first = _entries(split)[0].kind
    chat = first == "chat" or (first == "raw" and config.training.trainer_type.name != "PRETRAIN")
    mixed = any(dataset.mixture_proportion is not None for dataset in split.datasets)
    args = _common(config, notes)
    if chat:
        args |= _template(config, notes)
        if split.collator_name == COMPLETIONS or any(d.dataset_kwargs.get("assistant_only") for d in split.datasets):
            notes.comment("data", "pack: true trains on all tokens in Oumi too, whatever collator and dataset say")
        notes.comment(
            "data",
            "each conversation is joined whole, and ends with EOS once; Oumi cuts it to a window first, and adds EOS",
        )
    else:
        notes.nothing("data.train.pack", "documents are packed in any case")
    args["max_length"] = _max_length(config, notes) if chat or first == "raw" else _window(split, notes)
    if split.stream:
        args["streaming"] = True
        if config.training.max_steps <= 0:
            refuse("training.max_steps", "missing: data that are streamed have no known end; set it above 0")
    for number, dataset in enumerate(split.datasets):
        if dataset.shuffle and dataset.sample_count is None:
            notes.became[f"data.train.datasets[{number}].shuffle"] = "data.shuffle_buffer, its default"
    if not any(dataset.shuffle for dataset in split.datasets):
        args["shuffle_buffer"] = 0
        notes.comment("data.init_args.shuffle_buffer", "rows come in the order of the documents, as in Oumi")
    if mixed and split.mixture_strategy == "all_exhausted":
        if config.training.max_steps <= 0:
            refuse("data.train.mixture_strategy", "all_exhausted has no end that is known; set training.max_steps")
        args["exhausted"] = "restart"
    if mixed:
        notes.comment("data.init_args.train", "weights are shares in the tokens; in Oumi they are shares in the rows")
    notes.comment(
        "data.init_args.max_length",
        "Oumi never trains on a window's first token; here each token is trained once, and the rest of the last "
        "window is a shorter row (dropped in Oumi, or filled up with EOS if pack makes it)",
    )
    args |= _loading(config)
    args.pop("seed", None)  # Oumi's order of streamed rows depends on no seed of the sampler
    return {"class_path": PACKED_CHAT if chat else "PretrainData", "init_args": args}


def _common(config: TrainingConfig, notes: Notes) -> dict[str, Any]:
    """Sources and tokenizer."""
    for name in ("train", "validation"):
        if getattr(config.data, name).use_torchdata:
            why = "true is set, and has no counterpart: torchdata's pipelines are not used; leave it out"
            refuse(f"data.{name}.use_torchdata", why)
    args: dict[str, Any] = {"train": _sources(config, "train", notes)}
    if config.training.eval_strategy == "no":
        for path in list(notes.became):
            if path.startswith("data.validation.") or path in EVALUATION:
                notes.nothing(path, "training.eval_strategy is no")
    elif not config.data.validation.datasets:
        why = f"{config.training.eval_strategy} needs a dataset in data.validation, and there is none"
        refuse("training.eval_strategy", why)
    else:
        args["validation"] = _sources(config, "validation", notes)
        if config.data.validation.pack != config.data.train.pack and config.training.trainer_type.name != "PRETRAIN":
            notes.became["data.validation.pack"] = "nothing: evaluation rows are packed where data.train.pack is true"
            different = "evaluation rows are packed if the training rows are; Oumi packs each split by itself"
            notes.comment("data.init_args.validation", different)
    model, tokenizer = config.model, config.model.tokenizer_name or config.model.model_name
    own = model.load_pretrained_weights and tokenizer == model.model_name
    args |= {} if own else {"tokenizer": tokenizer}
    return args | given(pad_token=model.tokenizer_pad_token or model.tokenizer_kwargs.get("pad_token"))


def _sources(config: TrainingConfig, name: str, notes: Notes) -> Any:
    split: DatasetSplitParams = getattr(config.data, name)
    mixed = any(dataset.mixture_proportion is not None for dataset in split.datasets)
    if not mixed:
        notes.nothing(f"data.{name}.mixture_strategy", "there is no mixture_proportion, so that all rows are read")
    text_field = config.training.trainer_kwargs.get("dataset_text_field")
    sources = [
        source(
            dataset,
            f"data.{name}.datasets[{number}]",
            notes,
            config.training.seed,
            text_field,
            conversations=config.training.trainer_type.name == "TRL_GKD",
            model=config.model,
        )
        for number, dataset in enumerate(split.datasets)
    ]
    if name == "train" and mixed:
        notes.comment(
            "data.init_args.train",
            "an epoch has as many rows as all sources together, in these proportions; Oumi's ends with the "
            f"{'last' if split.mixture_strategy == 'all_exhausted' else 'first'} source at its end",
        )
    sources = [one for one in sources if one is not None]
    return sources[0] if len(sources) == 1 else sources


def _entries(split: DatasetSplitParams) -> list[Registered]:
    return [entry_of(dataset, f"data.train.datasets[{i}]") for i, dataset in enumerate(split.datasets)]


def _template(config: TrainingConfig, notes: Notes) -> dict[str, Any]:
    name = template(config.model, notes)
    if name in ADD_BOS:
        different = "a tokenizer that begins every text with BOS does so here; in Oumi not"
        notes.comment("data.init_args.template", different)
    if name == DEFAULT:
        different = "the last turn ends with a newline too, so that the model learns to stop; in Oumi nothing ends it"
        notes.comment("data.init_args.template", different)
    return {} if name is None else {"template": name}


def _max_length(config: TrainingConfig, notes: Notes) -> int:
    kwargs = config.training.trainer_kwargs
    length = config.model.model_max_length or kwargs.get("max_length") or kwargs.get(FORMER_LENGTH)
    if length is None and config.training.trainer_type.name in ("HF", "OUMI") and not config.data.train.pack:
        why = "missing: without it rows are cut where the tokenizer says, which is not known"
        refuse("model.model_max_length", why)
    if length is None:
        notes.became["model.model_max_length"] = f"data.max_length {TRL_LENGTH}, TRL's default"
    return int(length or TRL_LENGTH)


def _window(split: DatasetSplitParams, notes: Notes) -> int:
    lengths = [dataset.dataset_kwargs.get("seq_length") for dataset in split.datasets]
    if None in lengths:
        place = f"data.train.datasets[{lengths.index(None)}].dataset_kwargs.seq_length"
        refuse(place, "missing: documents are cut to this length")
    if len(different := dict.fromkeys(lengths)) > 1:
        refuse("data.train.datasets", f"seq_length differs ({', '.join(map(str, different))}); it has to be the same")
    notes.became["model.model_max_length"] = "nothing: dataset_kwargs.seq_length is the length of documents' rows"
    return int(lengths[0])  # type: ignore[arg-type]


def _loading(config: TrainingConfig) -> dict[str, Any]:
    training, workers = config.training, config.training.dataloader_num_workers
    if isinstance(workers, str):  # `auto`: Oumi's rule, for one process on this machine
        workers = max(1, min(2, (os.cpu_count() or 1) // 4))
    sizes = (training.per_device_train_batch_size, training.per_device_eval_batch_size)
    another_size = training.eval_strategy != "no" and sizes[1] != sizes[0]
    another_seed = training.data_seed != training.seed and training.trainer_type.name != "OUMI"
    return given(
        batch_size=sizes[0],
        eval_batch_size=sizes[1] if another_size else None,
        workers=workers or None,
        seed=training.data_seed if another_seed else None,
        trust_remote_code=config.model.trust_remote_code,
    )
