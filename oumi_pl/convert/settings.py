"""The settings of another library's config, and what is noted while they are translated."""

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from oumi_pl.core.recipe.notes import Notes, refuse
from oumi_pl.errors import UserError, nearest

UNKNOWN = "is unknown here"
UNREAD = "it has no effect beside the other keys"
NUMBERS = frozenset(
    """
    adam_beta1 adam_beta2 adam_epsilon batch_size beta buffer_size center_rewards_coefficient
    context_parallel_size cosine_constant_lr_ratio cosine_min_lr_ratio cp_size cpo_alpha cutoff_len
    desirable_weight dp_replicate_size dp_shard_size dp_size dpo_label_smoothing eaft_alpha eaft_k
    early_stopping_patience early_stopping_steps embedding_lr embedding_lr_scale eta_min eval_batch_size
    eval_steps expert_model_parallel_size expert_parallel_size freeze_trainable_layers global_batch_size
    gradient_accumulation_steps kto_chosen_weight kto_desirable_weight kto_rejected_weight
    kto_undesirable_weight label_smoothing label_smoothing_factor ld_alpha learning_rate logging_steps
    lora_alpha lora_dropout lora_r lora_rank loraplus_lr_ratio max_grad_norm max_length max_samples max_steps
    micro_batch_size mp_replicate_size mp_shard_size num_epochs num_machines num_processes num_samples num_train_epochs
    orpo_alpha per_device_eval_batch_size per_device_train_batch_size pipeline_model_parallel_size pref_beta
    pref_ftx rl_beta save_steps save_total_limit seed sequence_len simpo_gamma skip
    streaming_multipack_buffer_size tensor_model_parallel_size tensor_parallel_size undesirable_weight
    val_set_size val_size warmup_ratio warmup_steps weight_decay
    """.split()  # noqa: SIM905 - a list has a line for each
)
"""Keys of the libraries whose values are numbers."""
SWITCHES = frozenset(("bf16", "fp16", "pure_bf16"))
"""Keys that are true or false, or `auto`; axolotl has `full` as well."""
MAPPINGS = frozenset(
    (
        "lr_scheduler_kwargs",
        "model_config",
        "model_quantization_config_kwargs",
        "chat_template_kwargs",
        "special_tokens",
    )
)
LISTS = frozenset(
    (
        *("datasets", "test_datasets", "pretraining_dataset", "plugins", "unfrozen_parameters", "dpo_loss_type"),
        *("dataset", "eval_dataset", "add_tokens", "add_special_tokens", "report_to", "loss_weights"),
        *("data_files", "roles_to_train"),
    )
)
"""Keys whose values are lists; a single one may stand for itself."""


@dataclass(frozen=True)
class Keys:
    """What becomes of each key of a library's config, or of a part of it.

    A key may have `*` for any text. library: its name. translated: key -> key of the recipe. without_effect: key -> why
    nothing that is trained depends on it. refused: key -> why it has no counterpart; allowed if it is off (false, 0,
    empty). other_names: name of an argument of transformers' `TrainingArguments` (and of `peft` as TRL names it) -> the
    library's name for it. null: key -> the value that null stands for, where that is another one than the default.
    """

    library: str
    translated: Mapping[str, str]
    without_effect: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    other_names: Mapping[str, str] = field(default_factory=dict)
    null: Mapping[str, Any] = field(default_factory=dict)


class Settings:
    """The values of a config, whose defaults are noted beside the keys of the recipe that they become.

    Args:
        values: Content of the config. Keys whose value is null count as missing, but for those of `keys.null`.
        keys: What becomes of each key.
        whole: The settings of which these are a part; their notes are shared.
        place: Key of the part, such as `datasets[0]`.

    Raises:
        UserError: they are no mapping, or a key is unknown, or set and refused; the message lists all of them.
    """

    def __init__(self, values: Mapping[str, Any], keys: Keys, whole: "Settings | None" = None, place: str = "") -> None:
        if not isinstance(values, Mapping):
            raise UserError(f"{place}: {values!r:.40} is no mapping")
        with_null = {str(key): keys.null.get(str(key)) if value is None else value for key, value in values.items()}
        self.values = {key: value for key, value in with_null.items() if value is not None}
        self.keys = keys
        self.place = f"{place}." if place else ""
        self.notes: Notes = Notes() if whole is None else whole.notes
        self.parts: list[Settings] = []
        self.unread: set[str] = set()
        """Keys of the config that are translated, and were not read so far."""
        if whole is not None:
            whole.parts.append(self)
        self._refuse_other_types()
        refused = []
        for key, value in self.values.items():
            if (target := _entry(keys.translated, key)) is not None:
                self.unread.add(key)
                if whole is None:  # of a part, only what is not taken over is listed
                    self.notes.became[key] = target
            elif key not in keys.refused and (why := _entry(keys.without_effect, key)) is not None:
                self.became_nothing(key, why)
            elif (why := _entry(keys.refused, key)) is None:
                refused.append(f"{self.place}{key} {UNKNOWN}{nearest(key, keys.translated)}".rstrip(";"))
            elif not value:
                self.became_nothing(key, "it is off")
            else:
                refused.append(f"{self.place}{key}: {why}")
        if refused:
            them = "it" if len(refused) == 1 else "them"
            raise UserError(f"{'; '.join(refused)}. Remove {them} to convert the rest")

    def part(self, key: str, keys: Keys) -> "Settings":
        """The settings of a key whose value is a mapping; without any if it is missing.

        Raises:
            UserError: it is no mapping, or a key in it is unknown or refused.
        """
        value = self.get(key)
        return Settings({} if value is None else value, keys, self, f"{self.place}{self.name(key)}")

    def became_nothing(self, key: str, why: str) -> None:
        """Notes that a key is not taken over."""
        self.unread.discard(key)
        self.notes.became[f"{self.place}{key}"] = f"nothing: {why}"

    def name_unread(self) -> None:
        """Notes the keys that were not read, also those of parts: they have no effect beside the others."""
        for key in [key for key in self.values if key in self.unread]:
            self.became_nothing(key, UNREAD)
        for part in self.parts:
            part.name_unread()

    def _refuse_other_types(self) -> None:
        """Refuses values of other types than those that the libraries have.

        Raises:
            UserError: names all of them.
        """
        wrong = [
            f"{self.place}{key}: {value!r:.40} is not a number"
            for key, value in self.values.items()
            if key in NUMBERS and (isinstance(value, bool) or not isinstance(number(value), int | float))
        ]
        wrong += [
            f"{self.place}{key}: {value!r:.40} is neither true nor false"
            for key, value in self.values.items()
            if key in SWITCHES and str(value).lower() not in ("true", "false", "auto", "full")
        ]
        for keys, types, kind in ((MAPPINGS, Mapping, "mapping"), (LISTS, list | tuple | str | Mapping, "list")):
            wrong += [
                f"{self.place}{key}: {value!r:.40} is no {kind}"
                for key, value in self.values.items()
                if key in keys and not isinstance(value, types)
            ]
        if wrong:
            raise UserError("; ".join(wrong))

    def name(self, argument: str) -> str:
        """The library's name of an argument of transformers or TRL."""
        return self.keys.other_names.get(argument, argument)

    def has(self, argument: str) -> bool:
        """Whether a value is set."""
        return self.name(argument) in self.values

    def get(self, argument: str, default: Any = None) -> Any:
        """The value; the default if it is not set. Text that is a number, such as 2e-5 in YAML, is a number."""
        self.unread.discard(self.name(argument))
        value = self.values.get(self.name(argument), default)
        return number(value) if isinstance(default, int | float) and not isinstance(default, bool) else value

    def noted(self, argument: str, default: Any, place: str) -> Any:
        """As `get`; a default is noted at its key of the recipe, since it may differ from the one here."""
        if not self.has(argument):
            self.notes.comment(place, f"{self.name(argument)}: {self.keys.library}'s default")
        return self.get(argument, default)

    def comment(self, place: str, text: str) -> None:
        """Adds a comment to a key of the recipe."""
        self.notes.comment(place, text)

    def refuse(self, argument: str, why: str) -> Any:
        """Refuses the value of a key.

        Raises:
            UserError: always.
        """
        refuse(f"{self.place}{self.name(argument)}", why)

    def header(self) -> list[str]:
        """Lines that say what became of each key that is set: first the translated ones, then the others by reason."""
        by_reason: dict[str, list[str]] = {}
        for key, became in self.notes.became.items():
            by_reason.setdefault(became, []).append(key)
        lines = [f"  {', '.join(names)}: {became}" for became, names in by_reason.items()]
        is_nothing = [": nothing: " in line for line in lines]
        kept = [line for line, nothing in zip(lines, is_nothing, strict=True) if not nothing]
        dropped = [line.replace(": nothing: ", ": ") for line, no in zip(lines, is_nothing, strict=True) if no]
        return [
            *(["What its keys became:", *kept] if kept else []),
            *(["Keys that are not taken over, with the reason:", *dropped] if dropped else []),
        ]


def _entry(table: Mapping[str, str], key: str) -> str | None:
    """The value of a key, or of a pattern that it fits."""
    if key in table:
        return table[key]
    return next((value for name, value in table.items() if "*" in name and fnmatch.fnmatchcase(key, name)), None)


def number(value: Any) -> Any:
    """A number that is written as text; anything else unchanged."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", value.strip().lower()):
        as_float = float(value)
        return int(as_float) if re.fullmatch(r"[-+]?\d+", value.strip()) else as_float
    return value
