"""Oumi's own trainer, rebuilt on Lightning: any module that returns a loss, trained as its TrainingParams say."""

import datetime
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from torch import nn
from transformers import set_seed

from oumi_pl.core.recipe.profiling import TorchProfile, profile_arguments
from oumi_pl.core.trainers.base import BaseTrainer
from oumi_pl.core.trainers.collate import Collator, default_collator, log_first_example
from oumi_pl.core.trainers.data import Collate, DatasetModule
from oumi_pl.core.trainers.flow import Flow
from oumi_pl.core.trainers.folders import STATE, TRAINING, find_checkpoint, write_state
from oumi_pl.core.trainers.honoured import refuse_what_is_not_honoured
from oumi_pl.core.trainers.kinds import Adapted, Pretrained, Recomputing, bare
from oumi_pl.core.trainers.loggers import loggers
from oumi_pl.core.trainers.loss import Loss
from oumi_pl.core.trainers.module import LossModule
from oumi_pl.core.trainers.optimisation import refuse_unknown_names
from oumi_pl.core.trainers.records import Telemetry
from oumi_pl.core.trainers.saving import save_weights
from oumi_pl.data.plan import Layout
from oumi_pl.errors import UserError
from oumi_pl.runs.checkpoints import AtomicCheckpointIO
from oumi_pl.runs.loggers import finish

if TYPE_CHECKING:
    from transformers.trainer_callback import TrainerState

    from oumi_pl.core.configs import TrainingConfig, TrainingParams

logger = logging.getLogger("oumi_pl")


class Trainer(BaseTrainer):
    """Trains any `torch.nn.Module` that returns a loss: `model(**batch)["loss"]`, or an attribute `.loss`.

    An update's gradient is that of the mean over its targets, whatever the micro-batches, the processes and the length
    of the last update of an epoch: see `oumi_pl.core.trainers.loss` for what a target is. A killed and resumed run is
    bit-identical to an uninterrupted one, for a map-style dataset that gives a row the same each time.

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
        refuse_unknown_names(args)
        for section, flag in (("fsdp", "enable_fsdp"), ("deepspeed", "enable_deepspeed")):
            if config is not None and getattr(getattr(config, section), flag):
                whole = "this trainer keeps whole weights on each process"
                raise UserError(f"{section}.{flag}: {whole}; use trainer_type: SFT")
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
        ignore_index, makes_labels = self._loss.count.ignore_index, self._loss.makes_labels
        self._collate = data_collator or default_collator(self.tokenizer, ignore_index, makes_labels)
        if args.log_examples:
            self._collate = log_first_example(self._collate, self.tokenizer)
        logger.setLevel(args.log_level.upper())
        for library in ("lightning.pytorch", "lightning.fabric", "transformers"):
            logging.getLogger(library).setLevel(args.dep_log_level.upper())
        others = [c for c in callbacks or () if not isinstance(c, L.Callback)]
        self._flow = Flow(args, others, model, self.tokenizer)
        self._module: LossModule | None = None
        self._written: tuple[int, str] | None = None
        self._prepare_model()

    def _prepare_model(self) -> None:
        params, model = self.params, bare(self.model)
        if params.enable_gradient_checkpointing:
            if not isinstance(model, Recomputing):
                name = type(model).__name__
                raise UserError(f"training.enable_gradient_checkpointing: {name} has no gradient_checkpointing_enable")
            model.gradient_checkpointing_enable(params.gradient_checkpointing_kwargs or None)
            if isinstance(self.model, Adapted) and isinstance(model, Pretrained):
                cast("Any", model).enable_input_require_grads()  # frozen embeddings would give none to the first layer
        if params.compile:
            self.model.compile()

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
        named = resume_from_checkpoint or params.resume_from_checkpoint
        folder = find_checkpoint(named, self.output_dir, params.try_resume_from_last_checkpoint)
        if folder is None and params.try_resume_from_last_checkpoint:
            logger.warning("training.try_resume_from_last_checkpoint: %s has no checkpoint; starting", self.output_dir)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        set_seed((params.seed + rank) % 2**32)
        torch.backends.cudnn.deterministic = params.use_deterministic or torch.backends.cudnn.deterministic
        layout = Layout(params.per_device_train_batch_size, params.gradient_accumulation_steps, ranks, rank)
        collate = Collate(self._collate, self._loss.count)
        inputs = DatasetModule(self.train_dataset, self.eval_dataset, collate=collate, layout=layout, params=params)
        total, epochs = self._length(inputs)
        flow.begin(total, epochs, rank == 0)
        self._written = None
        self._module = module = LossModule(
            self._loss,
            params,
            flow,
            inputs,
            output_dir=self.output_dir,
            tokenizer=self.tokenizer,
            checkpoint=folder,
        )
        trainer = self._lightning(total, layout)
        self._describe(rank)
        self.model.train()  # what `from_pretrained` gives is not
        with warnings.catch_warnings():
            for expected in ("does not have many workers", "isinstance.treespec"):
                warnings.filterwarnings("ignore", f".*{expected}")
            trainer.fit(module, datamodule=inputs, ckpt_path=None if folder is None else folder / TRAINING)
        for tracker in trainer.loggers:
            finish(tracker, success=True)
        if params.save_final_model:
            self.save_state()
            self.save_model()

    def save_state(self) -> None:
        """Writes `trainer_state.json`: transformers' fields (epoch, global_step, log_history) and total_tokens_seen."""
        if self._flow.state.is_world_process_zero:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self._flow.export_callbacks()
            write_state(self.output_dir / STATE, self._flow.state)

    def save_model(self, config: Any = None, final: bool = True) -> None:
        """Writes the model and its tokenizer at the top of the output folder, once per step and mode.

        Args:
            config: Of it, `peft.peft_save_mode` is read; else of the config of the trainer.
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

    def _length(self, inputs: DatasetModule) -> tuple[int, int]:
        """Updates and epochs of the run."""
        per_epoch = inputs.updates_per_epoch
        if self.params.max_steps > 0:
            return self.params.max_steps, -(-self.params.max_steps // per_epoch) if per_epoch else 1
        if per_epoch is None:
            raise UserError("training.max_steps: set it; how long an epoch of this train_dataset is can't be known")
        return per_epoch * self.params.num_train_epochs, self.params.num_train_epochs

    def _lightning(self, total: int, layout: Layout) -> L.Trainer:
        """Lightning's Trainer for so many updates, on the processes that were started.

        It validates never: the flow decides when. Its own checkpoints are written only if a callback does so.
        """
        params, callbacks = self.params, [*self._lightning_callbacks]
        if (arguments := profile_arguments(params.profiler)) is not None:
            callbacks.append(TorchProfile(**arguments))
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        directory = params.telemetry_dir if params.include_performance_metrics and layout.rank == 0 else None
        precision: Any = {"BF16": "bf16-mixed", "FP16": "16-mixed"}.get(params.mixed_precision_dtype.name)
        return L.Trainer(
            accelerator="auto",
            devices=local,
            num_nodes=max(1, layout.ranks // local),
            strategy=_ddp(params) if layout.ranks > 1 else "auto",
            precision=precision,
            plugins=[AtomicCheckpointIO()],
            profiler=None if directory is None else Telemetry(directory / "telemetry_rank0000.json"),
            max_steps=total,
            max_epochs=-1,
            accumulate_grad_batches=layout.micro_batches,
            gradient_clip_val=params.max_grad_norm or None,
            check_val_every_n_epoch=sys.maxsize,
            log_every_n_steps=1,
            num_sanity_val_steps=0,
            logger=(loggers(params) if layout.rank == 0 else []) or False,
            callbacks=callbacks,
            default_root_dir=params.output_dir,
            enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks),
            enable_progress_bar=sys.stderr.isatty() or any(isinstance(c, ProgressBar) for c in callbacks),
            enable_model_summary=False,
            use_distributed_sampler=False,
            inference_mode=False,
            deterministic=params.full_determinism or None,
        )

    def _describe(self, rank: int) -> None:
        """Logs the modules of the model and writes them to the telemetry, if `log_model_summary` says so."""
        if not self.params.log_model_summary or rank:
            return
        logger.info("%s", self.model)
        directory = self.params.telemetry_dir
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "model_summary.txt").write_text(f"{self.model}\n", encoding="utf-8")


def _ddp(params: "TrainingParams") -> Any:
    from lightning.pytorch.strategies import DDPStrategy

    minutes = params.nccl_default_timeout_minutes
    more: dict[str, Any] = {} if minutes is None else {"timeout": datetime.timedelta(minutes=minutes)}
    # buffers are the same everywhere; sending them would need as many forward passes on each rank
    return DDPStrategy(find_unused_parameters=bool(params.ddp_find_unused_parameters), broadcast_buffers=False, **more)
