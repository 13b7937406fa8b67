"""What drives the training loop of an Oumi config."""

import os
from typing import Literal

from oumi_pl.core.configs import TrainingConfig
from oumi_pl.core.recipe.notes import Notes, refuse

Engine = Literal["lightning", "trl", "hf"]

ENGINES: dict[str, Engine] = {
    "TRL_SFT": "trl",
    "TRL_DPO": "trl",
    "HF": "hf",
    "OUMI": "lightning",
    "SFT": "lightning",
    "DPO": "lightning",
    "PRETRAIN": "lightning",
}
"""Trainer type -> what drives the training loop."""


def engine_of(config: TrainingConfig, kind: str, asked: Engine | None, devices: int | None, notes: Notes) -> Engine:
    """What drives the training loop: what was asked for, else what the trainer type stands for, as far as it can.

    Args:
        config: The config.
        kind: `SFT`, `DPO` or `Pretrain`.
        asked: What the user named; None for the trainer type's.
        devices: Devices per node; None for as many as there are.
        notes: Where comments go.

    Raises:
        UserError: what was asked for can't do something that the config says.
    """
    training = config.training
    usual = asked or ENGINES[training.trainer_type.name]
    if usual == "lightning":
        return usual
    peft = config.peft
    only_lightning = {
        "peft.lora_modules_to_save": (training.use_peft and peft.lora_modules_to_save, "modules trained as a whole"),
        "fsdp.enable_fsdp": (config.fsdp.enable_fsdp, "several devices"),
        "training.save_epoch": (training.save_epoch and training.save_steps <= 0, "checkpoints by epoch"),
    }
    for path, (is_set, what) in only_lightning.items():
        if is_set and asked:
            refuse(path, f"{asked} can't do {what} here; leave --engine out, or name lightning")
        if is_set:
            notes.comment("", f"Lightning drives it, and not {usual}, which can't do {what} here")
            return "lightning"
    if not asked and max(devices or 1, int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        notes.comment("", f"Lightning drives it, and not {usual}, which trains on one device")
        return "lightning"
    if not asked and (usual, kind) == ("trl", "Pretrain"):
        notes.comment("", "transformers' Trainer drives it, and not TRL's SFT, which does no more with rows of tokens")
        return "hf"
    return usual
