"""What `training.trainer_kwargs` may hold: arguments of transformers' and TRL's trainers, one by one."""

from oumi_pl.core.configs import TrainingConfig
from oumi_pl.core.recipe.notes import Notes, refuse
from oumi_pl.core.recipe.preference import KWARGS as PREFERENCE
from oumi_pl.errors import nearest

PLACE = "training.trainer_kwargs"

HARMLESS = {
    "use_liger_kernel": "the loss is computed in chunks without it; the numbers are the same",
    "padding_free": "it decides on speed alone",
    "pad_to_multiple_of": "it decides on speed alone",
    "activation_offloading": "it decides on memory alone",
    "dataset_num_proc": "it decides on speed alone",
    "precompute_ref_log_probs": "they are computed before training wherever that gives the same",
    "precompute_ref_batch_size": "it decides on speed alone",
    "remove_unused_columns": "columns that a format doesn't read are not kept",
    "dataset_kwargs": "rows are tokenized here in any case",
    "average_tokens_across_devices": "the loss is that of all tokens of all devices",
    "save_only_model": "checkpoints hold what it takes to go on",
}
"""Argument -> why nothing depends on it."""

OF_ANY = {
    "max_length": "data.max_length",
    "save_total_limit": "checkpoint.keep",
    "load_best_model_at_end": "checkpoint.monitor",
    "metric_for_best_model": "checkpoint.monitor",
    "greater_is_better": "checkpoint.mode",
}
OF_TOKENS = {
    "dataset_text_field": "columns of the source",
    "packing": "data.packing",
    "assistant_only_loss": "data.train_on",
    "completion_only_loss": "data.train_on",
    "label_smoothing_factor": "model.loss",
}
"""Argument -> the key of the recipe that says the same, of all trainers and of those of tokens."""

GONE = {
    "max_seq_length": "TRL has no such argument any more; set model.model_max_length",
    "max_prompt_length": "TRL has no such argument any more; set model.model_max_length",
    "max_completion_length": "TRL has no such argument any more; set model.model_max_length",
}

ONLY = {"loss_type": ("nll",), "truncation_mode": ("keep_start",), "packing_strategy": ("bfd",)}
"""Argument of TRL's SFT -> the values that have a counterpart, which are its defaults."""


def note_keywords(config: TrainingConfig, kind: str, notes: Notes) -> None:
    """Notes what becomes of each argument.

    Raises:
        UserError: an argument has no counterpart.
    """
    kwargs = config.training.trainer_kwargs
    if kwargs and config.training.trainer_type.name == "OUMI":
        refuse(PLACE, f"Oumi's own trainer reads none of {', '.join(kwargs)}; leave them out")
    known = OF_ANY | (dict.fromkeys(PREFERENCE, "model.loss and the reference") if kind == "DPO" else OF_TOKENS)
    for key, value in kwargs.items():
        place = f"{PLACE}.{key}"
        if key in known:
            notes.became[place] = known[key]
        elif key in HARMLESS:
            notes.became[place] = f"nothing: {HARMLESS[key]}"
        elif key in GONE:
            refuse(place, GONE[key])
        elif kind != "DPO" and key in ONLY:
            if value not in ONLY[key]:
                refuse(place, f"{value!r} has no counterpart; the only value is {ONLY[key][0]}")
        else:
            refuse(place, f"has no counterpart{nearest(key, [*known, *HARMLESS])}")
    notes.became.pop(PLACE, None)
    if "max_length" in kwargs and config.model.model_max_length is not None:
        notes.became[f"{PLACE}.max_length"] = "data.max_length, which is model.model_max_length"
