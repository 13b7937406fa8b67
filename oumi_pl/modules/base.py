"""What is identical for all trainer types: the model, the optimizer, prediction, and what checkpoints hold."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from oumi_pl import attention
from oumi_pl.errors import UserError
from oumi_pl.models.build import DType, build_model
from oumi_pl.models.causal_lm import CausalLM
from oumi_pl.models.config import build_config
from oumi_pl.models.generation import complete
from oumi_pl.models.lora import lora_config
from oumi_pl.models.positions import longest_document, refuse_too_few_positions
from oumi_pl.models.sharding import shard
from oumi_pl.modules.restorable import RestorableModule
from oumi_pl.optim import Constant, Schedule, parameter_groups


class LanguageModule(RestorableModule):
    """Trains a causal language model. Subclasses say what the loss of a batch is.

    Args:
        model: Hub id or directory of a pretrained model; leave it out to start from random weights.
        config: `model_type` and values of a config to start from; with `model`, values to override.
        dtype: Of the weights; `auto` takes the checkpoint's. Compute precision is `trainer.precision`.
        attn: Attention implementation; the fastest exact one for the data and the device when left out.
        lora: Arguments of `peft.LoraConfig` (`r`, `lora_alpha`, `target_modules`, `use_dora`, ...); all linear layers
            unless `target_modules` says otherwise.
        quantization: Load the frozen weights in 4 or 8 bits (QLoRA); needs a CUDA device and `lora`.
        freeze: Names of modules whose parameters are not trained.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        compile: Compile the model's layers with `torch.compile`.
        revision: Branch, tag or commit of the model on the hub.
        trust_remote_code: Run code that came with the model.
        optimizer: Class and arguments of the optimizer.
        schedule: Learning rate over optimizer steps.
    """

    wrapper: ClassVar[type[CausalLM]] = CausalLM
    """What makes a loss, or what a loss is made of, from a batch."""
    validation_metrics: tuple[str, ...] = ()
    """What validation logs, if that is known beforehand: a misspelt `monitor` is then told before training."""
    reads: ClassVar[str] = "tokens"
    """What its batches are made of: `tokens`, or `pairs` of responses. The data have to give the same."""
    details: ClassVar[tuple[str, ...]] = ()
    """Metrics that are logged, and not shown in the terminal after each validation."""

    def __init__(
        self,
        model: str | None = None,
        config: dict[str, Any] | None = None,
        *,
        dtype: DType = "float32",
        attn: str | None = None,
        lora: dict[str, Any] | None = None,
        quantization: Literal["nf4", "int8"] | None = None,
        freeze: Sequence[str] = (),
        gradient_checkpointing: bool = False,
        compile: bool = False,
        revision: str | None = None,
        trust_remote_code: bool = False,
        optimizer: OptimizerCallable = lambda params: AdamW(params, lr=2e-5, weight_decay=0.0),
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__()
        if model is None and not (config or {}).get("model_type"):
            raise UserError(
                "model: name a model (`model: HuggingFaceTB/SmolLM2-135M`) or a `config: {model_type: llama, …}`"
            )
        if quantization is not None and model is None:
            raise UserError("model.quantization: there are no pretrained weights to load in fewer bits; name a model")
        if quantization is not None and lora is None:
            raise UserError("model.quantization: quantized weights can't be trained; add `lora: {r: 16}`")
        if lora is not None:
            lora_config(lora)  # a misspelt key is told before any data is read
        if model is None:
            build_config(None, config, None)
        _made(optimizer, parameter_groups([("probe", torch.nn.Parameter(torch.zeros(1, 1)))]))  # a negative lr, say
        self.model_name = model
        self.config = config
        self.dtype_name: DType = dtype
        self.attn = attn
        self.lora = lora
        self.quantization = quantization
        self.freeze_modules = freeze
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_layers = compile
        self.revision = revision
        self.trust_remote_code = trust_remote_code
        self.optimizer = optimizer
        self.schedule = schedule or Constant()
        self.model: CausalLM | None = None
        self.generation_settings: dict[str, Any] = {}
        """Arguments of `complete` for `predict`."""
        self._hyperparameters: list[dict[str, Any]] = []

    @property
    def keeps_trained_weights_only(self) -> bool:
        """With adapters on a pretrained model, which is loaded again anyway."""
        return self.lora is not None and self.model_name is not None

    # ---- model

    def configure_model(self) -> None:
        """Builds the model, once the data say which tokenizer it has to fit; under FSDP2, shards it."""
        if self.model is not None:
            return
        data: Any = getattr(self.trainer, "datamodule", None)
        self.model = self.build(
            getattr(data, "tokenizer", None), getattr(data, "added_tokens", ()), getattr(data, "packing", False)
        )
        if data is not None:
            stage = self.trainer.state.fn.value if self.trainer.state.fn else "fit"
            documents = longest_document(data, list(data.needed(stage)))
            refuse_too_few_positions(self.model.base, data.max_length, documents)
        self.on_model_built()
        shard(self.model, self)

    def on_model_built(self) -> None:
        """Called once, with the weights that training starts from: none are restored or sharded yet."""

    def build(self, tokenizer: Any, added_tokens: Sequence[int] = (), packing: bool = False) -> CausalLM:
        """The model that the arguments describe, for a tokenizer; no trainer is needed."""
        hf = build_model(
            self.model_name,
            config=self.config,
            tokenizer=tokenizer,
            added_tokens=added_tokens,
            dtype=self.dtype_name,
            attn=self.attn or ("documents" if packing else None),
            lora=self.lora,
            quantization=self.quantization,
            freeze=self.freeze_modules,
            gradient_checkpointing=self.gradient_checkpointing,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
        )
        if self.compile_layers:
            hf.base_model.compile()
        return self.wrapper(hf)

    @property
    def causal_lm(self) -> CausalLM:
        """The model; configured by the time that any hook runs."""
        assert self.model is not None
        return self.model

    def on_fit_start(self) -> None:
        """Refuses models whose loss or packing would be wrong, by looking at what they compute."""
        if self._is_sharded:
            return  # sharded weights: the parts alone can't be run
        self.refuse_inexact_packing()
        self.causal_lm.refuse_unknown_logits()

    def refuse_inexact_packing(self) -> None:
        """Refuses a model that lets packed documents see each other.

        Raises:
            UserError: if it does, and documents are packed.
        """
        if getattr(getattr(self.trainer, "datamodule", None), "packing", False):
            attention.refuse_unless_isolating(self.causal_lm.base)

    # ---- optimizer

    def configure_optimizers(self) -> Any:
        """The optimizer over named groups, and its schedule in optimizer steps."""
        self._keep_adapters_in_float32()
        groups = parameter_groups(self.named_parameters(), self.causal_lm.vocabulary_weights)
        if not groups:
            raise UserError("model: no parameter is trainable; look at model.freeze and model.lora")
        optimizer = _made(self.optimizer, groups)
        self._fuse(optimizer)
        self._hyperparameters = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        total = self.total_steps()
        factor = self.schedule(total - 1, total)
        try:
            float(factor)  # whatever kind of number a schedule of the user's gives
        except (TypeError, ValueError, RuntimeError) as error:
            told = f"model.schedule: {type(self.schedule).__name__} gives {factor!r} instead of a number"
            raise UserError(told) from error
        for doubt in self.schedule.doubts(total):
            rank_zero_warn(doubt)
        schedule = LambdaLR(optimizer, lambda step: float(self.schedule(step, total)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _fuse(self, optimizer: Optimizer) -> None:
        """Lets AdamW take its step in one pass over memory, unless the recipe says how it does.

        Not in float16, where Lightning refuses to clip for an optimizer that unscales the gradients itself.
        """
        undecided = all(group.get("fused") is None and group.get("foreach") is None for group in optimizer.param_groups)
        unscaled = getattr(self.trainer.precision_plugin, "scaler", None) is None
        if isinstance(optimizer, AdamW | Adam) and undecided and unscaled and self.device.type in ("cpu", "cuda"):
            for group in optimizer.param_groups:
                group["fused"] = True

    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        trainer = self.trainer
        limits = [trainer.max_steps] if trainer.max_steps > 0 else []
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            # not `estimated_stepping_batches`: it builds the loader, whose position a checkpoint would set too late
            data: Any = getattr(trainer, "datamodule", None)
            limits.append(data.updates(trainer.max_epochs) if data else int(trainer.estimated_stepping_batches))
        if not limits:
            raise UserError("trainer: set max_steps or max_epochs, so that the schedule knows how long the run is")
        return min(limits)

    def on_train_start(self) -> None:
        """Lets what the recipe says now win over the optimizer settings in the checkpoint."""
        optimizer = cast("Optimizer", self.optimizers(use_pl_optimizer=False))
        schedule = cast("LambdaLR", self.lr_schedulers())
        before = optimizer.param_groups[0]["lr"]
        for group, values in zip(optimizer.param_groups, self._hyperparameters, strict=True):
            group.update(values)
            group["initial_lr"] = values["lr"]
        schedule.base_lrs = [values["lr"] for values in self._hyperparameters]
        for group, base_lr, factor in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = base_lr * factor(schedule.last_epoch)
        now = optimizer.param_groups[0]["lr"]
        if self.global_step and abs(now - before) > 0.01 * max(now, before):
            rank_zero_warn(f"the checkpoint's next learning rate was {before:.3g}, and this run goes on with {now:.3g}")

    def on_train_epoch_start(self) -> None:
        """Tells Lightning how long this epoch is: a mixture that is drawn anew need not pack into as many rows."""
        loop = self.trainer.fit_loop
        loader = self.trainer.train_dataloader
        if self.trainer.limit_train_batches == 1.0 and hasattr(loader, "position"):
            try:
                loop.max_batches = len(cast("Any", loader))
            except TypeError:  # a stream whose end isn't known
                return
            cast("Any", loop._combined_loader).limits = [loop.max_batches]

    def _keep_adapters_in_float32(self) -> None:
        # `precision: bf16-true` casts every parameter; adapters learn by steps that bfloat16 rounds away
        if self.lora is not None:
            for parameter in self.parameters():
                if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                    parameter.data = parameter.data.float()

    # ---- evaluation

    def log_evaluation(self, prefix: str, metrics: dict[str, Tensor]) -> None:
        """Logs what a pass through held-out data found: `val/loss`, …"""
        logged = {f"{prefix}/{name}": value.float() for name, value in metrics.items()}
        if self.trainer.state.fn == "fit":  # where `metrics.csv` puts it
            logged["step"] = torch.tensor(float(self.global_step))
        self.log_dict(logged)

    # ---- predict

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """Completes a batch of prompts: `{row, prompt, completion, reference}` each."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        texts = complete(
            self.causal_lm.hf, data.tokenizer, batch["prompts"], stop=data.stop_tokens, **self.generation_settings
        )
        prompts = [data.tokenizer.decode(ids) for ids in batch["prompts"]]
        columns = zip(batch["rows"], prompts, texts, batch["references"], strict=True)
        return [dict(zip(("row", "prompt", "completion", "reference"), line, strict=True)) for line in columns]


def _made(optimizer: OptimizerCallable, parameters: Any) -> Optimizer:
    try:
        return optimizer(parameters)
    except (ValueError, TypeError) as error:
        raise UserError(f"model.optimizer: {error}") from error
