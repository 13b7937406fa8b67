"""A trainer of transformers or TRL, as one of Oumi's."""

import logging
from pathlib import Path
from typing import Any, cast

from oumi_pl.core.trainers.base import BaseTrainer
from oumi_pl.core.trainers.kinds import Adapted
from oumi_pl.core.trainers.saving import save_weights

logger = logging.getLogger("oumi_pl")


class HuggingFaceTrainer(BaseTrainer):
    """Wraps a `transformers.Trainer`, or one of TRL's.

    Args:
        hf_trainer: The trainer.
        processor: Saved with the model, if there is one besides the trainer's own tokenizer.
    """

    def __init__(self, hf_trainer: Any, processor: Any = None) -> None:
        self.hf_trainer = hf_trainer
        self.processor = processor

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        """Trains to the end, from the start or from a checkpoint."""
        self.hf_trainer.train(resume_from_checkpoint=resume_from_checkpoint)

    def save_state(self) -> None:
        """Writes `trainer_state.json`."""
        self.hf_trainer.save_state()

    def save_model(self, config: Any = None, final: bool = True) -> None:
        """Writes the model at the top of the output folder; an adapter as `peft.peft_save_mode` says.

        Sharded weights (FSDP, DeepSpeed) are gathered by transformers; an adapter of theirs is always saved alone.

        Args:
            config: The configuration of the run.
            final: Whether an adapter may be merged.
        """
        trainer, output_dir = self.hf_trainer, Path(self.hf_trainer.args.output_dir)
        trainer.save_model(str(output_dir))
        if not trainer.is_world_process_zero():
            return
        if self.processor is not None:
            self.processor.save_pretrained(output_dir)
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        mode = config.peft.peft_save_mode.name if config is not None and final else "ADAPTER_ONLY"
        if mode == "ADAPTER_ONLY" or not isinstance(model, Adapted):
            return
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            logger.warning("peft.peft_save_mode: %s can't be done on sharded weights; the adapter is saved alone", mode)
            return
        save_weights(cast("Any", model), output_dir, mode=mode)

    def get_last_eval_metrics(self) -> dict[str, Any]:
        """The metrics of the last evaluation."""
        for row in reversed(self.hf_trainer.state.log_history):
            if any(name.startswith("eval_") for name in row):
                return dict(row)
        return {}
