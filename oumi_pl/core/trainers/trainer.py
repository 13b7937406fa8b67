"""Oumi's own trainer, rebuilt on Lightning: any module that returns a loss, trained as its TrainingParams say."""

import logging
import os
import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import numpy as np
import torch
from torch import nn

from oumi_pl.core.trainers.base import BaseTrainer
from oumi_pl.core.trainers.checkpointing import Checkpointer
from oumi_pl.core.trainers.collate import Collator, default_collator, log_first_example
from oumi_pl.core.trainers.engine import eval_loader, lightning_trainer
from oumi_pl.core.trainers.flow import Flow
from oumi_pl.core.trainers.folders import STATE, find_checkpoint, write_state
from oumi_pl.core.trainers.honoured import refuse_what_is_not_honoured
from oumi_pl.core.trainers.loss import Loss
from oumi_pl.core.trainers.module import TrainingModule
from oumi_pl.core.trainers.optimizers import refuse_unknown_optimizer
from oumi_pl.core.trainers.records import MetricsFile
from oumi_pl.core.trainers.saving import load_weights, save_weights
from oumi_pl.core.trainers.schedules import schedule
from oumi_pl.core.trainers.windows import Layout, SizedWindows, Windows, is_iterable
from oumi_pl.core.trainers.workers import workers
from oumi_pl.errors import UserError

if TYPE_CHECKING:
    from transformers.trainer_callback import TrainerState

    from oumi_pl.core.configs import TrainingConfig, TrainingParams

logger = logging.getLogger("oumi_pl")


class Trainer(BaseTrainer):
    """Trains any `torch.nn.Module` that returns a loss: `model(**batch)["loss"]`, or an attribute `.loss`.

    An update's gradient is that of the mean over its targets, whatever the micro-batches, the processes and the length
    of the last window of an epoch: see `oumi_pl.core.trainers.loss` for what a target is. Killed and resumed equals
    uninterrupted to the bit, for a map-style dataset that gives a row the same each time.

    Several processes are those that `torchrun` starts; gradients are averaged by DDP.

    Args:
        model: What is trained.
        tokenizer: Pads batches and is saved with the model; also by the names `processing_class` and `processor`.
        args: The parameters; all are honoured or refused by name.
        train_dataset: Map-style or iterable rows.
        processor: A processor to use in the place of a tokenizer.
        eval_dataset: Rows to evaluate on.
        callbacks: Lightning's callbacks and those of transformers, in one list.
        data_collator: Rows to a batch of named columns. Left out: with a tokenizer and rows that hold `input_ids`,
            columns as long as them are padded on the right (labels with -100; rows of a causal model without labels are
            trained on all their tokens); else torch's `default_collate`.
        config: The whole configuration of the run; of it, how an adapter is saved is read.
        processing_class: The tokenizer, by its name in transformers.

    Raises:
        UserError: for parameters that can't be honoured.
    """

    def __init__(  # noqa: PLR0917 - upstream's order
        self,
        model: nn.Module,
        tokenizer: Any = None,
        args: "TrainingParams | None" = None,
        train_dataset: Any = None,
        processor: Any = None,
        eval_dataset: Any = None,
        callbacks: Sequence[Any] | None = None,
        data_collator: Collator | None = None,
        config: "TrainingConfig | None" = None,
        *,
        processing_class: Any = None,
    ) -> None:
        if args is None:
            from oumi_pl.core.configs import TrainingParams

            args = TrainingParams()
        refuse_what_is_not_honoured(args, eval_dataset is not None)
        refuse_unknown_optimizer(args.optimizer)
        schedule(args, 1)
        _refuse_sharding(config)
        if train_dataset is None:
            raise UserError("train_dataset: there is nothing to train on")
        self.model = model
        self.params = args
        self.config = config
        self.tokenizer = next((t for t in (processing_class, tokenizer, processor) if t is not None), None)
        self.train_dataset = train_dataset
        self.eval_dataset = eval_dataset
        self.output_dir = Path(args.output_dir)
        self._lightning_callbacks = [c for c in callbacks or () if isinstance(c, L.Callback)]
        self._loss = Loss(model, -100 if args.label_ignore_index is None else args.label_ignore_index)
        self._collate = data_collator or default_collator(
            self.tokenizer, self._loss.ignore_index, self._loss.makes_labels
        )
        if args.log_examples:
            self._collate = log_first_example(self._collate, self.tokenizer)
        logger.setLevel(args.log_level.upper())
        for library in ("lightning.pytorch", "lightning.fabric", "transformers"):
            logging.getLogger(library).setLevel(args.dep_log_level.upper())
        others = [c for c in callbacks or () if not isinstance(c, L.Callback)]
        self._flow = Flow(args, others, model, self.tokenizer)
        self._checkpointer = Checkpointer(self.output_dir, self.tokenizer)
        self._module: TrainingModule | None = None
        self._written: tuple[int, str] | None = None
        self._prepare_model()

    def _prepare_model(self) -> None:
        params, model = self.params, cast("Any", self.model)
        if params.enable_gradient_checkpointing:
            if not hasattr(model, "gradient_checkpointing_enable"):
                name = type(model).__name__
                raise UserError(f"training.enable_gradient_checkpointing: {name} has no gradient_checkpointing_enable")
            model.gradient_checkpointing_enable(params.gradient_checkpointing_kwargs or None)
            if hasattr(model, "enable_input_require_grads") and hasattr(model, "peft_config"):
                model.enable_input_require_grads()
        if params.compile:
            model.compile()

    @property
    def state(self) -> "TrainerState":
        """Where the run stands, as transformers keeps it: `global_step`, `epoch`, `log_history` and the like."""
        return self._flow.state

    # ---- BaseTrainer

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        """Trains to the end, and writes state and model if `save_final_model` says so.

        Args:
            resume_from_checkpoint: A `checkpoint-N` folder; otherwise what the parameters say decides.
        """
        params, flow = self.params, self._flow
        asked = resume_from_checkpoint or params.resume_from_checkpoint
        folder = find_checkpoint(asked, self.output_dir, params.try_resume_from_last_checkpoint)
        if folder is None and params.try_resume_from_last_checkpoint:
            logger.warning("training.try_resume_from_last_checkpoint: %s has no checkpoint; starting", self.output_dir)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        _seed(params.seed + rank)
        torch.backends.cudnn.deterministic = params.use_deterministic or torch.backends.cudnn.deterministic
        windows = self._windows(
            Layout(params.per_device_train_batch_size, params.gradient_accumulation_steps, ranks, rank)
        )
        total, epochs = self._length(windows)
        flow.begin(total, epochs, rank == 0)
        self._written = None
        self._module = module = self._make_module(windows, rank)
        trainer = lightning_trainer(params, total, self._lightning_callbacks, ranks)
        if folder is not None:
            self._checkpointer.restore_before(module, trainer, folder)
        module.file.open(flow.state.global_step)
        self._describe(rank)
        self.model.train()  # what `from_pretrained` gives is not
        with warnings.catch_warnings():
            for expected in ("does not have many workers", "have no `val_dataloader`", "isinstance.treespec"):
                warnings.filterwarnings("ignore", f".*{expected}")
            trainer.fit(module, windows, eval_loader(self.eval_dataset, self._collate, params, ranks=ranks, rank=rank))
        if params.include_performance_metrics and rank == 0 and params.telemetry_dir is not None:
            module.timers.write(params.telemetry_dir / "telemetry_rank0000.json")
        if params.save_final_model:
            self.save_state()
            self.save_model()

    def save_state(self) -> None:
        """Writes `trainer_state.json`: transformers' fields (epoch, global_step, log_history) and total_tokens_seen."""
        if self._flow.state.is_world_process_zero:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            tokens = self._module.total_tokens_seen if self._module else 0
            self._flow.export_callbacks()
            write_state(self.output_dir / STATE, self._flow.state, tokens)

    def save_model(self, config: Any = None, final: bool = True) -> None:
        """Writes the model and its tokenizer at the top of the output folder, once per step and mode.

        Args:
            config: Of it, `peft.peft_save_mode` is read; else of the config that the trainer was made with.
            final: Whether an adapter may be merged.
        """
        config = config or self.config
        mode = config.peft.peft_save_mode.name if config is not None and final else "ADAPTER_ONLY"
        wanted = (self._flow.state.global_step, mode)
        if self._flow.state.is_world_process_zero and self._written != wanted:
            save_weights(self.model, self.output_dir, self.tokenizer, mode)
            self._written = wanted

    def get_last_eval_metrics(self) -> dict[str, Any]:
        """The metrics of the last evaluation: `eval_loss`, `eval_perplexity` of text, and how long it took."""
        return dict(self._module.eval_metrics) if self._module else {}

    # ---- how it is put together

    def _windows(self, layout: Layout) -> Windows:
        params = self.params
        kind = Windows if is_iterable(self.train_dataset) else SizedWindows
        return kind(
            self.train_dataset,
            self._collate,
            layout,
            params.data_seed,
            workers=workers(params.dataloader_num_workers),
            prefetch=params.dataloader_prefetch_factor,
            persistent=params.dataloader_persistent_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def _length(self, windows: Windows) -> tuple[int, int]:
        """Updates and epochs of the run."""
        per_epoch = windows.updates_per_epoch
        if self.params.max_steps > 0:
            return self.params.max_steps, -(-self.params.max_steps // per_epoch) if per_epoch else 1
        if per_epoch is None:
            raise UserError("training.max_steps: set it; how long an epoch of this train_dataset is can't be known")
        return per_epoch * self.params.num_train_epochs, self.params.num_train_epochs

    def _make_module(self, windows: Windows, rank: int) -> TrainingModule:
        file = MetricsFile(self.output_dir / "metrics_rank0000.jsonl" if rank == 0 else None)
        module: TrainingModule = TrainingModule(
            model=self.model,
            params=self.params,
            flow=self._flow,
            windows=windows,
            loss=self._loss,
            file=file,
            save=lambda: self._checkpointer.save(module),
            at_start=lambda: self._checkpointer.restore_after(module),
            at_end=self._load_best,
        )
        return module

    def _load_best(self) -> None:
        best = self._flow.state.best_model_checkpoint
        if self._flow.args.load_best_model_at_end and best is not None:
            load_weights(self.model, Path(best))

    def _describe(self, rank: int) -> None:
        """Writes the modules of the model down, if asked to."""
        if not self.params.log_model_summary or rank:
            return
        logger.info("%s", self.model)
        directory = self.params.telemetry_dir
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "model_summary.txt").write_text(f"{self.model}\n", encoding="utf-8")


def _refuse_sharding(config: Any) -> None:
    for section, flag in (("fsdp", "enable_fsdp"), ("deepspeed", "enable_deepspeed")):
        if getattr(getattr(config, section, None), flag, False):
            raise UserError(
                f"{section}.{flag}: this trainer keeps whole weights on each process; use trainer_type: SFT"
            )


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
