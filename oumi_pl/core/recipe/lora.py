"""LoRA and QLoRA of an Oumi config."""

from typing import Any

from oumi_pl.core.configs import PeftParams, TrainingConfig
from oumi_pl.core.recipe.notes import Notes, refuse

BEGINNINGS: dict[str, bool | str] = {"DEFAULT": True, "RANDOM": False, "GAUSSIAN": "gaussian"}
"""Oumi's names for how adapters begin -> PEFT's; the others rewrite the base, or don't work."""

WHY_NOT = {
    "EVA": "Oumi never runs it, so that it is DEFAULT; say that",
    "PISA": "it rewrites the base weights, on which the adapter is saved to lie; use DEFAULT or GAUSSIAN",
    "PISSA_NITER": "Oumi can't run it; use DEFAULT or GAUSSIAN",
    "LOFTQ": "Oumi can't run it; use DEFAULT or GAUSSIAN",
    "OLORA": "it rewrites the base weights, on which the adapter is saved to lie; use DEFAULT or GAUSSIAN",
}


def lora(config: TrainingConfig, notes: Notes) -> dict[str, Any]:
    """`model.lora` and `model.quantization`.

    Raises:
        UserError: something has no counterpart.
    """
    peft = config.peft
    made: dict[str, Any] = {"r": peft.lora_r, "lora_alpha": peft.lora_alpha}
    made |= {"lora_dropout": peft.lora_dropout} if peft.lora_dropout else {}
    made |= _targets(peft, notes)
    made |= {"bias": peft.lora_bias} if peft.lora_bias != "none" else {}
    name = peft.lora_init_weights.name
    if name not in BEGINNINGS:
        refuse("peft.lora_init_weights", f"{name} has no counterpart: {WHY_NOT[name]}")
    made |= {"init_lora_weights": BEGINNINGS[name]} if name != "DEFAULT" else {}
    notes.became["training.use_peft"] = "model.lora"
    return {"lora": made} | _quantization(config, notes)


def _targets(peft: PeftParams, notes: Notes) -> dict[str, Any]:
    made: dict[str, Any] = {}
    targets = peft.lora_target_modules
    if targets == ["all-linear"]:
        notes.became["peft.lora_target_modules"] = "all linear layers, which is so without model.lora.target_modules"
    elif targets is None:
        made["target_modules"] = None
        notes.comment("model.init_args.lora", "target_modules: null leaves the choice to PEFT, by architecture")
    else:
        made["target_modules"] = list(targets)
    if peft.lora_exclude_modules:
        made["exclude_modules"] = "|".join(f"(?:{pattern})" for pattern in peft.lora_exclude_modules)
    if peft.lora_target_parameters:
        made["target_parameters"] = list(peft.lora_target_parameters)
    if peft.lora_modules_to_save:
        made["modules_to_save"] = list(peft.lora_modules_to_save)
    return made


def _quantization(config: TrainingConfig, notes: Notes) -> dict[str, Any]:
    peft = config.peft
    if not peft.q_lora:
        return {}
    if config.fsdp.enable_fsdp:
        refuse("peft.q_lora", "a quantized base is not sharded; leave fsdp out, or train LoRA on a whole base")
    if peft.q_lora_bits == 8:
        return {"quantization": "int8"}
    if peft.bnb_4bit_quant_type != "nf4":
        refuse("peft.bnb_4bit_quant_type", f"{peft.bnb_4bit_quant_type} has no counterpart; set nf4")
    if peft.bnb_4bit_compute_dtype not in ("bfloat16", "bf16"):
        refuse(
            "peft.bnb_4bit_compute_dtype",
            f"{peft.bnb_4bit_compute_dtype} has no counterpart; set bfloat16, which it is",
        )
    notes.nothing("peft.use_bnb_nested_quant", "the constants of quantization are quantized in any case")
    if not peft.use_bnb_nested_quant:
        notes.comment("model.init_args.quantization", "the constants of quantization are quantized too (nested)")
    return {"quantization": "nf4"}
