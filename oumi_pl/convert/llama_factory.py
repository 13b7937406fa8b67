"""LLaMA-Factory's YAML as a recipe. What each key means was read in its sources (`hparams`, `data`, `train`)."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oumi_pl.convert import training
from oumi_pl.convert.formats import __name__ as FORMATS
from oumi_pl.convert.settings import Keys, Settings
from oumi_pl.convert.training import MODEL, SPEED
from oumi_pl.core.recipe.notes import given

IMAGES = "images, video and audio are not trained on"
OTHER_TRAINER = "this trainer type has no counterpart"
OTHER_METHOD = "this method changes what is trained and has no counterpart"
TRAIN = "data.init_args.train"

OTHER_NAMES = {
    "lora_r": "lora_rank",
    "lora_modules_to_save": "additional_target",
}

TRANSLATED = {key: place for key, place in training.NAMES.items() if key != "gradient_checkpointing"} | {
    "model_name_or_path": "model.model",
    "adapter_name_or_path": "model.model",
    "model_revision": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "stage": "model.class_path",
    "finetuning_type": "model.lora and freeze",
    **dict.fromkeys(("lora_rank", "lora_alpha", "lora_dropout", "lora_target", "additional_target"), "model.lora"),
    **dict.fromkeys(("use_rslora", "use_dora", "create_new_adapter"), "model.lora"),
    "loraplus_lr_ratio": "model.groups",
    **dict.fromkeys(("quantization_bit", "quantization_type", "double_quantization"), "model.quantization"),
    "quantization_method": "model.quantization",
    "pure_bf16": "model.dtype and trainer.precision",
    "disable_gradient_checkpointing": "model.gradient_checkpointing",
    "use_muon": "model.optimizer MuonAdamW",
    **dict.fromkeys(
        ("pref_beta", "pref_loss", "pref_ftx", "dpo_label_smoothing", "simpo_gamma", "ld_alpha"), "model.loss"
    ),
    **dict.fromkeys(("kto_chosen_weight", "kto_rejected_weight"), "model.desirable_weight and undesirable_weight"),
    "ref_model": "model.reference",
    **dict.fromkeys(("dataset", "dataset_dir", "mix_strategy", "interleave_probs", "max_samples"), "data.train"),
    **dict.fromkeys(("eval_dataset", "val_size"), "data.validation"),
    "template": "data.template",
    "enable_thinking": "data.template_variables",
    "cutoff_len": "data.max_length and overflow",
    **dict.fromkeys(("train_on_prompt", "mask_history"), "data.train_on"),
    **dict.fromkeys(("packing", "neat_packing"), "data.packing"),
    "streaming": "data.streaming",
    "buffer_size": "data.shuffle_buffer",
    **dict.fromkeys(("add_tokens", "add_special_tokens"), "data.tokens"),
    **dict.fromkeys(
        ("freeze_trainable_layers", "freeze_trainable_modules", "use_llama_pro"), "trainer.callbacks, TrainOnly"
    ),
    **dict.fromkeys(("use_dft_loss", "use_eaft_loss", "eaft_alpha"), "model.loss"),
    "early_stopping_steps": "trainer.callbacks, EarlyStopping",
    "preprocessing_num_workers": "data.processes",
    "fp8": "a comment",
    "disable_shuffling": "a comment",
    "tensor_model_parallel_size": "trainer.strategy",
    **dict.fromkeys(
        ("pipeline_model_parallel_size", "context_parallel_size", "expert_model_parallel_size", "use_megatron_bridge"),
        "the rows of each device",
    ),
}
"""Key -> key of the recipe."""

WITHOUT_EFFECT = training.WITHOUT_EFFECT | {
    **dict.fromkeys(("flash_attn", "enable_liger_kernel", "use_unsloth*", "shift_attn_*", "use_v1_kernels"), SPEED),
    **dict.fromkeys(("ddp_timeout", "fp8_*", "use_reentrant_gc", "low_cpu_mem_usage", "use_kt", "kt_*"), SPEED),
    **dict.fromkeys(("use_mca", "virtual_pipeline_model_parallel_size", "sequence_parallel", "moe_*"), SPEED),
    **dict.fromkeys(("bias_activation_fusion", "apply_rope_fusion", "use_distributed_optimizer", "overlap_*"), SPEED),
    **dict.fromkeys(("recompute_granularity", "ray_*", "use_packed_sequences"), SPEED),
    **dict.fromkeys(("preprocessing_batch_size", "overwrite_cache", "tokenized_path", "use_fast_tokenizer"), SPEED),
    **dict.fromkeys(("data_shared_file_system", "upcast_*", "use_cache", "cache_dir"), SPEED),
    **dict.fromkeys(
        ("plot_loss", "compute_accuracy", "swanlab_*", "include_effective_tokens_per_second"), training.LOGS
    ),
    **dict.fromkeys(
        ("eval_num_beams", "predict_with_generate", "print_param_status", "infer_*"),
        training.LOGS,
    ),
    **dict.fromkeys(("hf_hub_token", "ms_hub_token", "om_hub_token", "export_*"), training.HUB),
    **dict.fromkeys(("eval_on_each_dataset", "use_swanlab", "use_trackio"), training.LOGS),
    "gradient_checkpointing": "disable_gradient_checkpointing decides",
    "mixed_precision": "bf16 and fp16 decide",
    "ignore_pad_token_for_loss": "padding carries no loss",
    "loraplus_lr_embedding": "adapters of embeddings are not trained at a rate of their own",
    "resize_vocab": "the embeddings grow by data.tokens",
    "split_special_tokens": "special tokens in a text are single tokens",
    "do_predict": "completions are written by `predict` and `generate`",
    **dict.fromkeys(
        ("max_new_tokens", "top_p", "top_k", "temperature", "do_sample", "num_beams"), "it decides on generation"
    ),
    "freeze_vision_tower": "the text alone is trained",
    "freeze_multi_modal_projector": "the text alone is trained",
}

REFUSED = training.REFUSED | {
    **dict.fromkeys(("image_*", "video_*", "audio_*", "media_dir", "use_audio_in_video", "crop_to_patches"), IMAGES),
    **dict.fromkeys(("use_galore", "galore_*", "use_apollo", "apollo_*", "use_badam", "badam_*"), OTHER_METHOD),
    **dict.fromkeys(("use_asft_loss", "asft_*"), OTHER_TRAINER),
    **dict.fromkeys(("use_adam_mini", "shift_attn", "pref_bco_weight", "rope_scaling"), OTHER_METHOD),
    **dict.fromkeys(("mixture_of_depths", "pissa_*", "oft_*", "freeze_extra_modules"), OTHER_METHOD),
    **dict.fromkeys(("ppo_*", "reward_model*"), "PPO has no counterpart; GRPO is near"),
    **dict.fromkeys(("ref_model_adapters", "ref_model_quantization_bit"), "the reference is a whole model"),
    "use_hyper_parallel": "it has no counterpart; use trainer.strategy",
    "new_special_tokens_config": "embeddings that start from descriptions have no counterpart; name add_special_tokens",
    "tool_format": "tools are written by the template",
    "default_system": "put it into the rows as their system turn",
    "preserve_thinking": "it has no counterpart; the template decides",
    "freeze_language_model": IMAGES,
}
"""Key -> why it is refused if it is on."""

NULL = {"max_grad_norm": 0.0, "double_quantization": False}
"""Key -> the value that null stands for; of others it is the default, or refused by LLaMA-Factory."""

KEYS = Keys("LLaMA-Factory", TRANSLATED, WITHOUT_EFFECT, REFUSED, OTHER_NAMES, NULL)

STAGES = {"sft": "SFT", "pt": "Pretrain", "dpo": "DPO", "kto": "KTO", "rm": "Reward"}
"""`stage` -> trainer type."""

TEMPLATES = {
    "chatml": "chatml",
    **dict.fromkeys(("qwen3_nothink", "qwen3_5_nothink"), "chatml"),
    "llama3": "llama3",
    "qwen": "trl/qwen2_5",
    "gemma": "trl/gemma",
    "gemma3": "trl/gemma3",
    "phi": "oumi/phi3-instruct",
    "deepseek3": "trl/deepseekv3",
}
"""LLaMA-Factory's name of a template -> ours, which writes the same text for turns with text, but for BOS."""
WITHOUT_COUNTERPART = ("default", "alpaca", "vicuna", "empty", "fewshot")
"""Templates that write other text than that of any tokenizer."""


def recipe(values: Mapping[str, Any], folder: Path, devices: int | None = None) -> tuple[dict[str, Any], Settings]:
    """The recipe that trains what LLaMA-Factory trains with a config, and the notes on it.

    Args:
        values: The config.
        folder: Its folder, in or above which `dataset_dir` is looked for.
        devices: Devices per node.

    Raises:
        UserError: something has no counterpart.
    """
    settings = Settings(values, KEYS)
    ranks = training.divide_rows(settings, _ranks(settings), 8)
    stage = str(settings.noted("stage", "sft", "model"))
    if stage not in STAGES:
        settings.refuse("stage", f"{stage} has no counterpart; there are {', '.join(STAGES)}")
    kind = STAGES[stage]
    section = _data(settings, kind, folder)
    init = _model(settings) | _objective(settings, kind)
    if settings.get("use_muon"):
        settings.values["optim"] = "muon"
    init["optimizer"] = training.optimizer(settings, "adamw_torch_fused", 5e-5)
    if (schedule := training.schedule(settings, "linear")) is not None:
        init["schedule"] = schedule
    mixed = "bf16" if settings.get("bf16") else "fp16" if settings.get("fp16") else None
    trainer = training.trainer(settings, epochs=3.0, mixed=mixed, devices=devices, ranks=ranks)
    if settings.get("fp8"):
        settings.comment("trainer.precision" if mixed else "trainer", training.FP8)
    if settings.get("pure_bf16"):
        trainer["precision"] = "bf16-true"
    trainer |= given(callbacks=_callbacks(settings))
    tree = training.sections(settings, kind, init, section, trainer)
    logger = training.loggers(settings.get("report_to"))
    return tree | training.around(settings, output="saves", save="steps", save_steps=500, logger=logger), settings


def _ranks(settings: Settings) -> training.Ranks:
    """How Megatron arranges the devices, which divides all weights among them."""
    tensor = training.size(settings, "tensor_model_parallel_size")
    others = [training.size(settings, key) for key in ("pipeline_model_parallel_size", "context_parallel_size")]
    experts = training.size(settings, "expert_model_parallel_size")
    if settings.get("use_megatron_bridge"):  # where LLaMA-Factory counts them among the devices that share rows
        others.append(experts)
        settings.became_nothing("use_megatron_bridge", SPEED)
    if max(tensor, experts, *others) > 1:
        settings.values.setdefault("fsdp", "full_shard")
    return training.Ranks(tensor=tensor, sharing=math.prod(others))


def _callbacks(settings: Settings) -> list[dict[str, Any]]:
    callbacks = freeze(settings) if settings.get("finetuning_type") == "freeze" else []
    if patience := settings.get("early_stopping_steps"):
        stop = {"monitor": "val/loss", "patience": int(patience)}
        callbacks.append({"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": stop})
    return callbacks


def freeze(settings: Settings) -> list[dict[str, Any]]:
    """The callback that trains some layers alone.

    Raises:
        UserError: parts of layers are named.
    """
    if settings.get("freeze_trainable_modules", "all") != "all":
        settings.refuse("freeze_trainable_modules", "parts of layers are named by TrainOnly's patterns in the recipe")
    arguments: dict[str, Any] = {"last_layers": int(settings.get("freeze_trainable_layers", 2))}
    arguments |= given(spread=bool(settings.get("use_llama_pro")))
    return [{"class_path": "oumi_pl.convert.train_only.TrainOnly", "init_args": arguments}]


def quantization(settings: Settings, bits: Any) -> str | None:
    """`model.quantization`; None without.

    Raises:
        UserError: it is not bitsandbytes' with 4 or 8 bits.
    """
    if bits is None:
        return None
    if str(settings.get("quantization_method", "bnb")).lower() not in ("bnb", "bitsandbytes") or bits not in (4, 8):
        settings.refuse("quantization_bit", f"{bits}: the base is quantized by bitsandbytes, to 4 or 8")
    if bits == 4 and settings.get("quantization_type", "nf4") != "nf4":
        settings.refuse("quantization_type", "4 bits are nf4")
    if bits == 4 and settings.get("double_quantization") is False:
        settings.comment(f"{MODEL}.quantization", "the constants of quantization are quantized too")
    return {4: "nf4", 8: "int8"}[bits]


def find(name: str, folder: Path) -> Path | None:
    """A file or folder of a config: as it is named, or in or above the folder of the config."""
    places = [Path(name), *(place / name for place in (folder, *folder.resolve().parents))]
    return next((place for place in places if place.exists()), None)


# --- the model --------------------------------------------------------------------------------------------------------


def _model(settings: Settings) -> dict[str, Any]:
    method = str(settings.noted("finetuning_type", "lora", MODEL))
    if method not in ("lora", "full", "freeze"):
        settings.refuse("finetuning_type", f"{method}: {OTHER_METHOD}")
    adapter = settings.get("adapter_name_or_path")
    if adapter and (settings.get("create_new_adapter") or "," in str(adapter)):
        settings.refuse("adapter_name_or_path", "merge the adapters first (`export --merge`), and name that folder")
    init: dict[str, Any] = {"model": adapter or settings.get("model_name_or_path")}
    if settings.get("pure_bf16") or (settings.get("bf16") and method == "lora"):
        init["dtype"] = "bfloat16"
        if method == "lora":
            settings.comment(f"{MODEL}.dtype", "of the frozen weights; the adapter is trained in float32")
    if adapter:
        training.refuse_quantized_adapter(settings, "adapter_name_or_path")
        settings.comment(training.LORA, training.NEW_ADAPTER)
    if method == "lora":
        rank = settings.get("lora_rank", 8)
        defaults = {"r": 8, "alpha": 2 * int(rank), "dropout": 0.0}
        targets = str(settings.noted("lora_target", "all", training.LORA))
        modules = "all-linear" if targets == "all" else [one.strip() for one in targets.split(",")]
        if isinstance(saved := settings.get("lora_modules_to_save"), str):
            settings.values["additional_target"] = [one.strip() for one in saved.split(",")]
        init["lora"] = training.lora(settings, defaults, modules)
    init |= given(quantization=quantization(settings, settings.get("quantization_bit")))
    if ratio := settings.get("loraplus_lr_ratio", 0.0):
        init["groups"] = {"*lora_B*": {"lr_factor": float(ratio)}}
    return init | given(
        gradient_checkpointing=not settings.get("disable_gradient_checkpointing", False),
        revision=settings.get("model_revision") if settings.get("model_revision") != "main" else None,
        trust_remote_code=bool(settings.get("trust_remote_code")),
    )


LOSSES = {"sigmoid": "Sigmoid", "hinge": "Hinge", "ipo": "IPO"}


def _objective(settings: Settings, kind: str) -> dict[str, Any]:
    if kind == "KTO":
        if settings.get("pref_ftx", 0.0):
            settings.refuse("pref_ftx", "KTO has no SFT term here")
        return {
            "loss": {"class_path": "KTOLoss", "init_args": {"beta": float(settings.get("pref_beta", 0.1))}},
            "desirable_weight": float(settings.get("kto_chosen_weight", 1.0)),
            "undesirable_weight": float(settings.get("kto_rejected_weight", 1.0)),
        } | given(reference=settings.get("ref_model"))
    if kind == "Reward":
        settings.comment(MODEL, "the score is read at the last token that is not the pad token, by a head without bias")
        return {"loss": {"class_path": "BradleyTerry"}}
    if settings.get("use_dft_loss"):
        return {"loss": {"class_path": "oumi_pl.convert.losses.ProbabilityWeighted"}}
    if settings.get("use_eaft_loss"):
        arguments = {"alpha": float(settings.get("eaft_alpha", 1.0)), "scale": 3.0}
        return {"loss": {"class_path": "oumi_pl.convert.losses.EntropyWeighted", "init_args": arguments}}
    if kind != "DPO":
        smoothing = settings.get("label_smoothing_factor")
        return (
            {"loss": {"class_path": "CrossEntropy", "init_args": {"label_smoothing": float(smoothing)}}}
            if smoothing
            else {}
        )
    return {"loss": preference_loss(settings)} | given(reference=settings.get("ref_model"))


def preference_loss(settings: Settings) -> dict[str, Any]:
    """`model.loss` of `pref_loss` and what belongs to it.

    Raises:
        UserError: it has no counterpart.
    """
    name, beta = str(settings.get("pref_loss", "sigmoid")), float(settings.get("pref_beta", 0.1))
    loss: dict[str, Any]
    if name == "orpo":
        loss = {"class_path": "ORPO", "init_args": {"beta": beta}}
    elif name == "simpo":
        # gamma / beta is subtracted before beta multiplies, so that gamma is that of the paper
        loss = {"class_path": "SimPO", "init_args": {"beta": beta, "gamma": float(settings.get("simpo_gamma", 0.5))}}
    elif name in LOSSES:
        smoothing = float(settings.get("dpo_label_smoothing", 0.0))
        loss = {"class_path": LOSSES[name], "init_args": {"beta": beta} | given(label_smoothing=smoothing or None)}
    else:
        settings.refuse("pref_loss", f"{name!r} has no counterpart; use one of {', '.join((*LOSSES, 'orpo', 'simpo'))}")
    if settings.get("ld_alpha") is not None:
        loss = {"class_path": "LDDPO", "init_args": {"loss": loss, "alpha": float(settings.get("ld_alpha", 1.0))}}
    if weight := float(settings.get("pref_ftx", 0.0)):
        losses = [loss, {"class_path": "SFTTerm"}]
        loss = {"class_path": "WeightedSum", "init_args": {"losses": losses, "weights": [1.0, weight]}}
    return loss


# --- the data ---------------------------------------------------------------------------------------------------------


def _data(settings: Settings, kind: str, folder: Path) -> dict[str, Any]:
    info = _dataset_info(settings, folder)
    names = _names(settings.get("dataset"))
    if not names:
        settings.refuse("dataset", "missing, so there is nothing to train on")
    sources = [_source(settings, name, info, kind) for name in names]
    if (strategy := settings.get("mix_strategy", "concat")) != "concat":
        _mix(settings, sources, str(strategy))
    args: dict[str, Any] = {"train": sources[0] if len(sources) == 1 else sources}
    held_out = [_source(settings, name, info, kind) for name in _names(settings.get("eval_dataset"))]
    size = float(settings.get("val_size", 0.0))
    if held_out:
        args["validation"] = held_out[0] if len(held_out) == 1 else held_out
    elif size >= 1:
        settings.comment(TRAIN, f"val_size: {int(size)} rows: name a source or a fraction as validation")
    elif size:
        args["validation"] = size
        settings.comment(training.VALIDATION, "held out by a hash of the prompt; LLaMA-Factory draws rows")
    args |= given(tokens=_names(settings.get("add_tokens")) + _names(settings.get("add_special_tokens")) or None)
    args["max_length"] = int(settings.noted("cutoff_len", 2048, "data.init_args.max_length"))
    if kind == "Pretrain":
        return args | _documents(settings) | _loading(settings)
    args |= given(template=_template(settings))
    if settings.has("enable_thinking"):
        args["template_variables"] = {"enable_thinking": bool(settings.get("enable_thinking"))}
    args["overflow"] = "keep_start"
    settings.comment(
        "data.init_args.overflow",
        "rows are cut at the end; LLaMA-Factory divides what fits by the lengths of prompt and answer",
    )
    args |= given(processes=settings.get("preprocessing_num_workers")) | _loading(settings)
    return args | _rows(settings, kind)


def _names(value: Any) -> list[str]:
    listed = value.split(",") if isinstance(value, str) else list(value or [])
    return [str(one).strip() for one in listed]


def _dataset_info(settings: Settings, folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The folder of the data and `dataset_info.json`; None if data sets are named as on the hub (`ONLINE`).

    Raises:
        UserError: the file isn't there, or can't be read.
    """
    name = settings.get("dataset_dir", "data")
    if isinstance(name, Mapping):
        return folder, dict(name)
    if name == "ONLINE":
        return None
    if str(name).startswith("REMOTE:"):
        settings.refuse("dataset_dir", f"{name}: download it (hf download --repo-type dataset), and name that folder")
    file = find(f"{name}/dataset_info.json", folder)
    if file is None:
        settings.refuse(
            "dataset_dir",
            f"there is no {name}/dataset_info.json, which says what {settings.get('dataset')} is; "
            "add --dataset_dir FOLDER",
        )
        raise AssertionError
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        settings.refuse("dataset_dir", f"{file} is no JSON")
    return file.parent, info


COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": "history",
    "system": "system",
    "messages": "conversations",
    "tools": "tools",
    "chosen": "chosen",
    "rejected": "rejected",
    "kto_tag": "label",
}
"""LLaMA-Factory's name of a column -> the field of a format."""
ALPACA = {
    "SFT": "joined_alpaca",
    "DPO": "joined_alpaca_pair",
    "Reward": "joined_alpaca_pair",
    "KTO": "joined_alpaca_feedback",
}
"""Trainer type -> how alpaca's columns are read."""
CHATS = {"SFT": "sharegpt", "DPO": "sharegpt_preference", "Reward": "sharegpt_preference", "KTO": "feedback"}
ENTRY_KEYS = Keys(
    "LLaMA-Factory",
    {
        **dict.fromkeys(("hf_hub_url", "file_name", "subset", "split", "num_samples", "formatting"), "a source"),
        **dict.fromkeys(("script_url", "cloud_file_name"), "a source"),
        **dict.fromkeys(("columns", "tags"), "columns"),
    },
    {
        "ranking": "pairs are read by the trainer types of pairs",
        **dict.fromkeys(("ms_hub_url", "om_hub_url"), "it is read from another place"),
    },
    {
        "folder": "a folder of a data set on the hub is no source; fetch its files, and name them",
    },
)
"""What becomes of the keys of a data set in `dataset_info.json`."""
COLUMN_KEYS = Keys(
    "LLaMA-Factory",
    dict.fromkeys(COLUMNS, "columns"),
    {"*": "LLaMA-Factory does not read it"},
    dict.fromkeys(("images", "videos", "audios"), IMAGES),
)
"""What becomes of the keys of its `columns`."""
SHARED_COLUMNS = ("system", "tools")
OF_SHAPE = {
    "alpaca": ("prompt", "query", "history", *SHARED_COLUMNS),
    "chat": ("messages", *SHARED_COLUMNS),
}
OF_KIND = {"SFT": ("response",), "KTO": ("response", "kto_tag"), "DPO": ("chosen", "rejected")}
OF_KIND["Reward"] = OF_KIND["DPO"]
"""Trainer type -> columns of its responses; conversations have none of their own."""


def _source(settings: Settings, name: str, info: tuple[Path, dict[str, Any]] | None, kind: str) -> dict[str, Any]:
    if info is None:
        return {"path": name}
    folder, table = info
    if name not in table:
        settings.refuse("dataset", f"{name} is not in {folder / 'dataset_info.json'}")
    entry = Settings(table[name], ENTRY_KEYS, settings, f"dataset_info.{name}")
    named = entry.part("columns", COLUMN_KEYS)
    place = entry.get("hf_hub_url") or (str(folder / str(entry.get("file_name"))) if entry.has("file_name") else None)
    if place is None:
        settings.refuse("dataset", f"{name}: only files and data sets of the hub are read (hf_hub_url, file_name)")
    source: dict[str, Any] = {"path": place} | given(config=entry.get("subset"))
    source |= {"split": entry.get("split")} if entry.get("split", "train") != "train" else {}
    most = settings.get("max_samples")
    if samples := entry.get("num_samples"):
        source["sample"] = min(samples, most or samples)
        settings.comment(TRAIN, "num_samples: the first ones, repeated if there are fewer; LLaMA-Factory draws them")
    elif most:
        source["split"] = f"{source.get('split', 'train')}[:{most}]"
    if kind == "Pretrain":
        text = named.get("prompt", "text" if named.values else "instruction")
        return source | ({"columns": {"text": text}} if text != "text" else {})
    if entry.get("formatting", "alpaca") == "alpaca":
        source["format"], read = f"{FORMATS}.{ALPACA[kind]}", (*OF_SHAPE["alpaca"], *OF_KIND[kind])
    else:
        _check_tags(settings, name, entry.get("tags") or {})
        responses = [key for key in OF_KIND[kind] if key != "response"]
        source["format"], read = CHATS[kind], (*OF_SHAPE["chat"], *responses)
    columns = {COLUMNS[key]: named.get(key) for key in read if named.get(key)}
    renamed = {field: column for field, column in columns.items() if field != column}
    if source["format"] in ("sharegpt", "sharegpt_preference") and renamed.get("conversations") == "messages":
        source["format"] = source["format"].replace("sharegpt", "messages")
        del renamed["conversations"]
    return source | given(columns=renamed, ignore=_unnamed(entry, named, read))


def _unnamed(entry: Settings, named: Settings, read: tuple[str, ...]) -> list[str]:
    """Columns with the name of a field that LLaMA-Factory leaves out, since `columns` names others but not this one."""
    if not entry.has("columns"):
        return []
    fields = [COLUMNS[key] for key in read if key in ("query", "history", *SHARED_COLUMNS) and not named.get(key)]
    return [field for field in fields if field not in named.values.values()]


ROLE_TAGS = {
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "system_tag": ("system",),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call",),
    "role_tag": ("from", "role"),
    "content_tag": ("value", "content"),
}


def _check_tags(settings: Settings, name: str, tags: Mapping[str, str]) -> None:
    for tag, value in tags.items():
        if value not in ROLE_TAGS.get(tag, ()):
            settings.refuse("dataset", f"{name}: turns with {tag} {value!r} need a format of your own")


def _mix(settings: Settings, sources: list[dict[str, Any]], strategy: str) -> None:
    shares = [float(share) for share in _names(settings.get("interleave_probs"))]
    if len(shares) != len(sources):
        settings.refuse("interleave_probs", f"a share for each of the {len(sources)} data sets is needed")
    for source, share in zip(sources, shares, strict=True):
        source["weight"] = share
    settings.comment(TRAIN, f"mix_strategy {strategy}: an epoch has as many rows as all sources together")


def _documents(settings: Settings) -> dict[str, Any]:
    training.by_length(settings, "Pretrain")
    if settings.get("disable_shuffling"):
        settings.comment(TRAIN, "documents are shuffled; LLaMA-Factory takes them in order")
    if settings.get("packing") is False:
        settings.comment("data", "packing: false: documents are packed whole, and longer ones divided")
        return {"packing": "best_fit", "isolate": True}
    settings.comment(
        "data",
        "documents are joined and cut into rows as in LLaMA-Factory, which drops the rest of each 1000 documents",
    )
    section: dict[str, Any] = {"isolate": True} if settings.get("neat_packing") else {}
    if settings.get("streaming"):
        if int(settings.get("max_steps", -1)) <= 0:
            settings.refuse("max_steps", "missing: data that are streamed have no known end")
        section |= {"streaming": True, "shuffle_buffer": int(settings.get("buffer_size", 16384))}
    return section


def _rows(settings: Settings, kind: str) -> dict[str, Any]:
    if settings.get("streaming"):
        settings.comment(TRAIN, "rows are read and tokenized before training, and not streamed")
    if settings.get("disable_shuffling"):
        settings.comment(TRAIN, "rows are shuffled; LLaMA-Factory takes them in order")
    if kind != "SFT":
        return training.by_length(settings, kind)
    section: dict[str, Any] = {}
    if settings.get("train_on_prompt"):
        section["train_on"] = "all"
    elif settings.get("mask_history"):
        section["train_on"] = "last_turn"
    if settings.get("packing") or settings.get("neat_packing"):
        if not settings.get("neat_packing"):
            settings.comment(
                "data.init_args.packing",
                "rows of a pack don't see each other; in LLaMA-Factory they do unless neat_packing is set",
            )
        return section | {"packing": True}
    return section | training.by_length(settings, kind)


def _loading(settings: Settings) -> dict[str, Any]:
    return {"batch_size": int(settings.noted("per_device_train_batch_size", 8, "data.init_args.batch_size"))} | given(
        eval_batch_size=settings.get("per_device_eval_batch_size"),
        workers=settings.get("dataloader_num_workers") or None,
        trust_remote_code=bool(settings.get("trust_remote_code")),
    )


def _template(settings: Settings) -> str | None:
    name = settings.get("template")
    name = None if name is None else str(name)
    if name is None:
        settings.comment("data", "template: the tokenizer's own, as in LLaMA-Factory")
        return None
    if name in WITHOUT_COUNTERPART:
        settings.refuse(
            "template", f"{name} has no counterpart; write it as a .jinja file, and use that as data.template"
        )
    if name not in TEMPLATES:
        settings.comment(
            "data",
            f"template {name}: the tokenizer's own is used; LLaMA-Factory has a copy of its own, "
            "which may differ in system text and empty thoughts",
        )
    return TEMPLATES.get(name)
