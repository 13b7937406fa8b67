"""The base class of all trainer types: model, reference, optimizer, prediction and export."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BasePredictionWriter,
    BatchSizeFinder,
    Checkpoint,
    ModelPruning,
    ProgressBar,
    StochasticWeightAveraging,
)
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import AdamW, Optimizer

from oumi_pl import attention
from oumi_pl.errors import UserError
from oumi_pl.models.architectures import register_architecture
from oumi_pl.models.build import (
    DType,
    build_config,
    build_model,
    refuse_too_few_positions,
    source_of_weights,
)
from oumi_pl.models.export import export_model, read_heads
from oumi_pl.models.fp8 import FP8, convert, refuse_unfit_device
from oumi_pl.models.generation import complete
from oumi_pl.models.given import adopt, as_model, set_attention
from oumi_pl.models.lm import (
    LM,
    ScoringLM,
    choose_layout,
    disable_dropout,
    forest,
    padded,
    with_layout,
    without_layout,
)
from oumi_pl.models.lora import lora_config
from oumi_pl.models.recomputation import Recomputation, refuse_compiled
from oumi_pl.models.sharding import (
    Loading,
    Source,
    compile_layers,
    decoder_layers,
    is_sharded,
    is_to_be_divided,
    is_to_be_sharded,
    loading_of,
    reshard,
    same_generator,
    shard,
)
from oumi_pl.modules.reference import Reference
from oumi_pl.modules.update import RestorableModule, Split
from oumi_pl.optim import Constant, Schedule, fuse, parameter_groups, scale_rates
from oumi_pl.runs.checkpoints import AtomicCheckpointIO
from oumi_pl.types import SPLITS, Batch, RunData, beside

HALF_PRECISION: dict[str, DType] = {"bf16-true": "bfloat16", "16-true": "float16"}
"""Values of `trainer.precision` for which Lightning casts the weights."""

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    ModelName = str | PreTrainedModel
else:  # the type of a recipe; Python may pass the model itself
    ModelName = str


class Comparison(NamedTuple):
    """Log-probabilities of the targets of a batch, `[targets]` float32 each."""

    logps: Tensor
    """Under the policy, differentiable."""
    ref_logps: Tensor
    """Under the reference."""


READ_IN_SETUP = (BaseFinetuning,)
"""Callbacks of Lightning that read the model in `setup`."""


class BuildModel(L.Callback):
    """Builds the model before the callbacks that need one in their `setup`."""

    def setup(self, trainer: Any, pl_module: L.LightningModule, stage: str) -> None:
        """Builds the model as Lightning would, right after the `setup` of callbacks and module."""
        call._call_configure_model(trainer)


class LanguageModule(RestorableModule):
    """Trains a causal language model. Subclasses define the loss of a batch.

    Args:
        model: Hub id or directory of a pretrained model; leave it out to start from random weights. From Python also a
            causal LM of transformers, or any `nn.Module` from token ids to logits, which is then trained itself.
        config: `model_type` and values of a config to start from; with `model`, values to override.
        architecture: Class path of a model of your own, a subclass of `transformers.PreTrainedModel` with a
            `config_class`; `config` then needs no `model_type`.
        dtype: Of the weights; `auto` takes the checkpoint's. Compute precision is `trainer.precision`.
        attn: Attention implementation; the fastest exact one for the data and the device when left out.
        lora: Arguments of `peft.LoraConfig` (`r`, `lora_alpha`, `target_modules`, `use_dora`, ...); all linear layers
            unless `target_modules` says otherwise.
        quantization: Load the frozen weights in 4 or 8 bits (QLoRA); needs `lora` and bitsandbytes, on CPUs 0.50 of it.
        unquantized: Names, or ends of names, of linear layers that `quantization` leaves as they are, beside the head.
        freeze: Names of modules whose parameters are not trained, adapters included.
        gradient_checkpointing: Recompute activations in the backward pass to save memory: those of all layers (`true`),
            or what a policy says: `EveryNth`, `Selective`, `Offload`.
        compile: Compile the model's layers with `torch.compile`.
        fp8: Multiply in 8-bit floating point in the model's layers, with torchao, on an H100, L40S, RTX 4090 or newer;
            it takes `compile` to be faster. `emulated` rounds the same way on any device, and is slower.
        revision: Branch, tag or commit of the model on the hub.
        trust_remote_code: Run code that came with the model.
        text_only: Of a model with other parts, such as a vision tower, take and export the text model alone. Otherwise
            the text is trained, and the export keeps the other parts as they are.
        optimizer: Class and arguments of the optimizer.
        schedule: Learning rate over optimizer steps.
        groups: Names of modules or parameters, with `*` for any text -> settings of the optimizer for them:
            `{lm_head: {lr: 1.0e-4}}`. `lr_factor` multiplies the learning rate.
        layer_decay: Factor on the learning rate for each layer below the head, at most 1 (layer-wise decay). The head
            has the full rate, the last layer once this factor, and the embeddings the smallest rate.
    """

    branching: ClassVar[bool | None] = None
    """Whether it needs examples with several segments, such as pairs (True), or without (False); None: takes both."""
    validation_metrics: tuple[str, ...] = ()
    """Names of the metrics of validation, to refuse a misspelt `monitor` before training; empty: not checked."""
    generates: ClassVar[bool] = True
    """Whether the model completes prompts. If not, no samples are written and `predict` is refused."""
    group_name: ClassVar[str] = "pair"
    """The name of a row whose segments share a prompt, for messages."""
    scoring: ClassVar[bool] = False
    """Whether the model gives each path a score instead of next tokens: transformers' sequence classification."""
    details: ClassVar[tuple[str, ...]] = ()
    """Metrics that are logged, but not shown in the terminal after a validation."""
    reference: Reference | None = None
    """The reference of a policy, if the trainer type sets one in its constructor. Dropout is then off."""
    __weight_loading = Loading()
    share_prompt: Literal["auto"] | bool = "auto"
    """Whether tokens that several segments share are computed once. `auto`: if the model can do so exactly."""

    def __init__(
        self,
        model: ModelName | None = None,
        config: dict[str, Any] | None = None,
        *,
        architecture: str | None = None,
        dtype: DType = "float32",
        attn: str | None = None,
        lora: dict[str, Any] | None = None,
        quantization: Literal["nf4", "int8"] | None = None,
        unquantized: Sequence[str] = (),
        freeze: Sequence[str] = (),
        gradient_checkpointing: bool | Recomputation = False,
        compile: bool = False,
        fp8: FP8 = False,
        revision: str | None = None,
        trust_remote_code: bool = False,
        text_only: bool = False,
        optimizer: OptimizerCallable = lambda params: AdamW(params, lr=2e-5, weight_decay=0.0),
        schedule: Schedule | None = None,
        groups: dict[str, dict[str, Any]] | None = None,
        layer_decay: float = 1.0,
    ) -> None:
        super().__init__()
        self.model_object: Any = None
        """The model, if it was passed as an object; in a list, since it is no submodule beside `model`."""
        if model is not None and not isinstance(model, str):
            other = {"config": config, "quantization": quantization, "revision": revision}
            if self.scoring:
                raise UserError(f"model: {type(self).__name__} gives scores; pass the name or folder of a model")
            model = as_model(model, **other, dtype=dtype if dtype not in ("float32", "auto") else None)
            self.model_object = [model]
        if not 0 < layer_decay <= 1:
            raise UserError(f"model.layer_decay is {layer_decay}, but has to be above 0 and at most 1")
        if architecture is not None:
            model_type = register_architecture(architecture)
            config = config if model is not None else {"model_type": model_type} | (config or {})
        if model is None and not (config or {}).get("model_type"):
            raise UserError(
                "model: name a model (`model: HuggingFaceTB/SmolLM2-135M`) or a `config: {model_type: llama, …}`"
            )
        _refuse_quantization(quantization, unquantized, model, lora)
        _refuse_together(quantization=quantization, fp8=fp8, compile=compile, policy=gradient_checkpointing)
        if lora is not None:
            lora_config(lora)  # a misspelt key is reported before any data is read
        if model is None:
            build_config(None, config, None)
        # built once with a dummy parameter, so that a negative learning rate, for example, is refused now
        _optimizer(optimizer, parameter_groups([("probe", torch.nn.Parameter(torch.zeros(1, 1)))]))
        self.model_name = model if isinstance(model, str | None) else model.name_or_path or None
        self.config = config
        self.dtype_name: DType = dtype
        self.attn = attn
        self.lora = lora
        self.quantization = quantization
        self.unquantized = unquantized
        self.freeze_modules = freeze
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_layers = compile
        self.fp8: FP8 = fp8
        self.revision = revision
        self.trust_remote_code = trust_remote_code
        self.text_only = text_only
        self.optimizer = optimizer
        self.schedule = schedule or Constant()
        self.groups = groups or {}
        self.layer_decay = layer_decay
        self.model: LM | None = None
        self.loss: Any = None
        """The loss of a token or a pair, for trainer types that have a replaceable one."""
        self.generation_settings: dict[str, Any] = {}
        """Arguments of `complete` for `predict`."""
        self.engine_notes: list[str] = []
        """Lines that an engine other than Lightning adds to `notes`."""
        self.__is_start = False
        self.__built: list[LM] = []  # in a list, since it is no second submodule

    @property
    def tokenizer_name(self) -> str | None:
        """The model whose tokenizer the data use unless they name one; None if there is none."""
        return self.model_name

    @property
    def keeps_trained_weights_only(self) -> bool:
        """Whether the model is pretrained with adapters: resuming loads its frozen weights again."""
        return self.lora is not None and self.model_name is not None and self.model_object is None

    @property
    def adapter_weights(self) -> set[str]:
        """Names of the weights that LoRA trains, also of those that `freeze` names."""
        return set() if self.model is None else {f"model.hf.{name}" for name in self.model.adapter_weights}

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, *, tokenizer: Any = None, **kwargs: Any
    ) -> "LanguageModule":
        """Builds a module with arguments of the constructor, and loads the weights of a checkpoint.

        Checkpoints hold no arguments. One of a recipe holds the recipe:
        `oumi_pl.commands.export.load_checkpoint(path)` builds the module from that, with its data and tokenizer.

        Args:
            checkpoint_path: A checkpoint file.
            tokenizer: The tokenizer that random weights are built for (`data.tokenizer`); None: that of the config.
            kwargs: Arguments of the constructor.

        Raises:
            UserError: arguments are missing, or are those of another model.
        """
        remedy = f"pass the arguments of {cls.__name__}, or use oumi_pl.commands.export.load_checkpoint(path) for a run"
        if not kwargs:
            raise UserError(f"load_from_checkpoint: checkpoints hold no arguments; {remedy}")
        content = AtomicCheckpointIO().load_checkpoint(checkpoint_path)
        module = cls(**kwargs)
        module.assemble(tokenizer, branching=bool(cls.branching))
        module.load_weights(content["state_dict"])
        return module

    # ---- model

    def configure_model(self) -> None:
        """Builds the model for the tokenizer of the data, and shards it under FSDP2.

        Raises:
            UserError: the model can't be built, does not fit the data, or computes its logits in an unknown way.
        """
        if self.model is not None and self.model in self.__built:
            return
        refuse_unfit_callbacks(self.trainer.callbacks)  # type: ignore[attr-defined]
        self.__refuse_undividable()
        refuse_unfit_device(self.fp8, self.trainer.strategy.root_device)
        if self.__built and self.reference is not None:
            self.reference.opened = None  # it was that of another model
        data = self.data
        if isinstance(self.model, LM):
            model = self.__prepared(self.model)
        elif data is None:
            model = self.assemble(None)
        else:
            model = self.assemble(data.tokenizer, data.added_tokens, branching=data.branching)
        if data is not None:
            stage = self.trainer.state.fn.value if self.trainer.state.fn else "fit"
            refuse_too_few_positions(model.base, data.max_length, data.longest_path(list(data.needed(stage))))
        self.__refuse_sharded_loss()
        self.__check_and_shard(model)
        self.on_model_built()
        self.__built = [model]

    def __check_and_shard(self, model: LM) -> None:
        """Compiles the model, shards it if the strategy does so, and checks its logits (and its layout, if sharded).

        Raises:
            UserError: the architecture computes its logits in an unknown way.
        """
        half = HALF_PRECISION.get(str(self.trainer.precision))
        dtype = getattr(torch, half) if half else None
        if not is_to_be_sharded(self):
            model.refuse_unknown_logits()
            if dtype is not None:
                model.keep_dtypes(dtype)
            convert(decoder_layers(model) or [model.body], self.fp8)
            if self.compile_layers:  # after the check: compiling for its few tokens would take a minute
                compile_layers(model)
            return
        convert(decoder_layers(model) or [model.body], self.fp8)  # before layers are sharded
        if self.compile_layers:  # also before sharding
            compile_layers(model)
        copies = self.reference is not None and self.reference.kind == "online"
        # FSDP2 wants one dtype for all weights that are trained
        copy = shard(model, self, self.__weight_loading, dtype=dtype, copy=copies)
        if self.reference is not None:
            self.reference.sharded_copy = copy
        if dtype is not None:
            model.fix_dtypes()
        self.__check_on_device()
        reshard(model)

    def __prepared(self, model: LM) -> LM:
        """A model that the user assigned to `self.model`, with what `assemble` would have added."""
        self.model_object = [model.hf]
        model.train()  # `from_pretrained` returns eval mode, which Lightning would keep
        if self.reference is not None:
            disable_dropout(model)
        if self.data is not None and model.layout is not padded:
            share = self.data.branching and self.share_prompt is not False
            longest = 0 if self.__is_checked_on_device else self.__longest_row
            model.layout, model.layout_reason = choose_layout(model.hf, share, longest)
        self.__weight_loading = Loading()
        if not self.heads():
            self.make_heads(model)
        return model

    def __refuse_undividable(self) -> None:
        """Refuses settings that can't be had with tensor parallelism, before weights are loaded.

        Raises:
            UserError: one is set.
        """
        if not is_to_be_divided(self):
            return
        dora = bool((self.lora or {}).get("use_dora"))
        settings = {"compile": self.compile_layers, "fp8": self.fp8, "quantization": self.quantization}
        settings |= {"lora.use_dora": dora}
        for key, value in settings.items():
            if value:
                raise UserError(f"model.{key} can't be had with trainer.strategy.tensor: leave one of them out")

    def __refuse_sharded_loss(self) -> None:
        """Refuses to shard the parameters of a loss, which is called where they are not gathered.

        Raises:
            UserError: the strategy shards weights, and the loss has some.
        """
        own = isinstance(self.loss, torch.nn.Module) and any(p.requires_grad for p in self.loss.parameters())
        if own and is_to_be_sharded(self):
            raise UserError(
                f"model.loss: {type(self.loss).__name__} has parameters of its own, which can't be sharded; train with "
                "strategy ddp, or move them into make_heads and call them in loss_sums"
            )

    def assemble(self, tokenizer: Any, added_tokens: Sequence[int] = (), *, branching: bool | None = False) -> LM:
        """Builds the model and its heads and assigns them to the module; takes the arguments of `build`.

        Raises:
            UserError: the model folder holds other heads than this trainer type has.
        """
        if self.model is not None and not isinstance(self.model, LM):  # assigned by the user, instead of an argument
            self.model_object, self.model = [as_model(self.model)], None
        self.model = self.build(tokenizer, added_tokens, branching=branching)
        self.make_heads(self.model)
        if self.model_name is not None and (heads := self.heads()):
            read_heads(Path(self.model_name).expanduser(), heads)
        return self.model

    def make_heads(self, model: LM) -> None:
        """Override to create what is trained beside the model, such as a reward head; assign it to `self`."""

    def on_model_built(self) -> None:
        """Called once with the initial weights, before any are restored from a checkpoint; on all ranks if sharded."""
        if self.reference is not None:
            self.reference.remember(self.causal_lm)

    def build(self, tokenizer: Any, added_tokens: Sequence[int] = (), *, branching: bool | None = False) -> LM:
        """Builds the model for a tokenizer; needs no trainer.

        Args:
            tokenizer: The tokenizer that the vocabulary has to fit; None: not checked.
            added_tokens: Ids that were added to the tokenizer.
            branching: Whether segments may continue others, which decides the layouts to try; None if the model will
                not read batches: no layout is chosen.

        Raises:
            UserError: `share_prompt` is true and the model can't share prompts.
        """

        def build(packed: bool) -> Any:
            return build_model(
                self.model_name,
                config=self.config,
                tokenizer=tokenizer,
                added_tokens=added_tokens,
                dtype=self.weights_dtype,
                attn=self.attn or (attention.NAME if packed else None),
                lora=self.lora,
                quantization=self.quantization,
                unquantized=self.unquantized,
                freeze=self.freeze_modules,
                gradient_checkpointing=self.gradient_checkpointing,
                revision=self.revision,
                trust_remote_code=self.trust_remote_code,
                scoring=self.scoring,
                text_only=self.text_only,
                loading=self.__weight_loading,
            )

        builder = build if self.model_object is None else self.__given(tokenizer, added_tokens)
        wrap = ScoringLM if self.scoring else LM
        if branching is None:  # of a copy, which is whole in a sharded run, too
            self.__weight_loading = Loading()
            return wrap(builder(False))
        self.__weight_loading = loading_of(self, self.__weight_source(tokenizer, added_tokens))
        if self._trainer is not None and is_to_be_sharded(self):
            model = without_layout(builder, wrap)  # until the weights are there, see `configure_model`
            same_generator(self)
        else:
            # long rows are tried on the device if it is another one, see `begin_fit`
            longest = 0 if self.__is_checked_on_device else self.__longest_row
            model = with_layout(builder, branching and self.share_prompt is not False, longest, wrap)
            self.__require_shared_prompts(model, branching)
        if self.reference is not None:
            disable_dropout(model)
        return model

    def __weight_source(self, tokenizer: Any, added_tokens: Sequence[int]) -> Source:
        """Where the ranks get the weights, if the run shards them."""
        if self.model_object is not None or self._trainer is None or not is_to_be_sharded(self):
            return "every rank"
        return source_of_weights(
            self.model_name,
            config=self.config,
            tokenizer=tokenizer,
            added_tokens=added_tokens,
            lora=self.lora,
            quantization=self.quantization,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            text_only=self.text_only,
        )

    def __require_shared_prompts(self, model: LM, branching: bool) -> None:
        """Refuses a layout that repeats prompts, if they are to be shared.

        Raises:
            UserError: the model can't share them.
        """
        if branching and self.share_prompt is True and model.layout is not forest:
            raise UserError(f"model.share_prompt: {model.layout_reason}; leave it out to compute prompts twice")

    def __given(self, tokenizer: Any, added_tokens: Sequence[int]) -> Callable[[bool], Any]:
        """Prepares the model that was passed as an object; returns what sets its attention, with packed rows or not."""
        (hf,) = self.model_object
        own = hf.config._attn_implementation
        prepared = adopt(
            hf,
            tokenizer=tokenizer,
            added_tokens=added_tokens,
            lora=self.lora,
            freeze=self.freeze_modules,
            gradient_checkpointing=self.gradient_checkpointing,
        )

        def with_attention(packed: bool) -> Any:
            set_attention(hf, self.attn or (attention.NAME if packed else own))
            return prepared

        return with_attention

    @property
    def weights_dtype(self) -> DType:
        """The dtype to build the model in: that of `trainer.precision` if it is `bf16-true` or `16-true`.

        Lightning would cast a model that was built in another, but `from_pretrained` and the architecture know which
        parts have to stay in float32.
        """
        trainer = self._trainer
        return self.dtype_name if trainer is None else HALF_PRECISION.get(str(trainer.precision), self.dtype_name)

    @property
    def causal_lm(self) -> LM:
        """The model; set before any hook but `setup` runs.

        `module.causal_lm(batch)` are the log-probabilities of the targets of a batch, and
        `module.causal_lm(batch, compute)` is what `compute` makes of its hidden states; see `oumi_pl.models.lm.States`.

        Raises:
            UserError: the model was not built.
        """
        if self.model is None:
            own = type(self).configure_model is not LanguageModule.configure_model
            why = (
                f"{type(self).__name__}.configure_model has to call super().configure_model(), or to assign self.model"
                if own
                else "`trainer.fit` builds it, or `assemble(tokenizer)` without a trainer"
            )
            raise UserError(f"{type(self).__name__} has no model yet: {why}")
        return self.model

    @property
    def trainer(self) -> L.Trainer:
        """The trainer, once it runs."""
        return super().trainer

    @trainer.setter
    def trainer(self, trainer: L.Trainer | None) -> None:
        """Adds a callback that builds the model, if others need one in their `setup`, which Lightning calls earlier."""
        L.LightningModule.trainer.fset(self, trainer)  # type: ignore[attr-defined]
        callbacks: list[Any] = getattr(trainer, "callbacks", [])
        first = next((i for i, callback in enumerate(callbacks) if isinstance(callback, READ_IN_SETUP)), None)
        if first is not None and not any(isinstance(callback, BuildModel) for callback in callbacks):
            callbacks.insert(first, BuildModel())

    def compare(self, batch: Batch, split: Split) -> Comparison:
        """Log-probabilities of a batch's targets under policy and reference.

        Args:
            batch: A batch of this split, on the device.
            split: `train`, `validation` or `test`: precomputed log-probabilities are found by the split's examples.

        Raises:
            UserError: the module has no reference.
        """
        if self.reference is None or self.reference.kind == "none":
            raise UserError(f"{type(self).__name__} has no reference: set self.reference = Reference(self)")
        self.__open_reference(split)
        return Comparison(self.causal_lm(batch), self.reference.logps(batch, split))

    @property
    def data(self) -> RunData | None:
        """The data module of the run; None if the trainer was called with loaders."""
        return getattr(self.trainer, "datamodule", None)

    @property
    def notes(self) -> list[str]:
        """Lines about the model to print before the first update."""
        data, model = self.data, self.causal_lm
        notes = [*self.engine_notes] + ([] if self.reference is None else [self.reference.description])
        if data is not None and data.branching:
            if self.branching:
                what, once, again = "prompts are computed", f"once per {self.group_name}", "for each response"
            else:  # conversations with a branch for each turn
                what, once, again = "histories that several turns share are computed", "once", "for each turn"
            why = model.layout_reason or "share_prompt is off"
            notes.append(f"{what} {once}" if model.layout is forest else f"{what} {again}: {why}")
        elif data is not None and data.packing and model.layout is padded:
            notes.append(f"packed documents are computed in rows of their own, padded: {model.layout_reason}")
        return notes

    @property
    def doubts(self) -> list[str]:
        """Advice on the settings for these data, which is given as warnings before the first update."""
        return []

    def count(self, batch: Batch) -> dict[str, int]:
        """Adds the positions that the model computes in its layout; see `UpdateModule`."""
        counts = super().count(batch)
        return counts | {"positions": self.causal_lm.positions(batch) if counts["rows"] else 0}

    def begin_fit(self) -> None:
        """Checks layout and logits again on the device, whose attention kernels are others; opens the reference."""
        super().begin_fit()
        if self.__is_checked_on_device:
            self.__check_on_device()
        self.__open_reference()

    @property
    def __is_checked_on_device(self) -> bool:
        """Whether layout and logits are checked on another device than the one that the model is built on."""
        trainer = self._trainer
        return trainer is not None and trainer.strategy.root_device.type != "cpu" and not is_to_be_sharded(self)

    @property
    def __longest_row(self) -> int:
        """A bound on the tokens of a row of the run; 0 without data."""
        data = None if self._trainer is None else self.data
        if data is None:
            return 0
        return data.max_length * max(data.batch_size, data.eval_batch_size) * (2 if data.branching else 1)

    def __check_on_device(self) -> None:
        model, data = self.causal_lm, self.data
        # eager: compiling for the few tokens of the checks would take a minute each
        with torch.compiler.set_stance("force_eager") if self.compile_layers else nullcontext():
            if model.layout is not padded and data is not None:
                share, longest = data.branching and self.share_prompt is not False, self.__longest_row
                model.choose_layout(share, longest)
                self.__require_shared_prompts(model, data.branching)
            model.refuse_unknown_logits()

    # ---- reference

    def begin_evaluation(self) -> None:
        """Opens the reference, if it is not open because only validation or test runs."""
        super().begin_evaluation()
        self.__open_reference()

    def __open_reference(self, *splits: str) -> None:
        splits = splits or SPLITS[str(cast("Any", self.trainer.state.fn).value)]
        if self.reference is not None and not self.reference.covers(splits):
            self.reference.open(splits)

    def check_start(self, batch: Batch) -> None:
        """Checks on the first batch, before it is trained on, that policy and reference are equal.

        Raises:
            UserError: they are not.
        """
        if self.reference is not None:
            self.reference.check_start(batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Calls `check_start` on the very first batch, then does what `UpdateModule` does."""
        if self.__is_start:
            self.__is_start = False
            self.check_start(batch)
        return super().training_step(batch, batch_idx)

    def after_update(self, step: int) -> None:
        """Moves the reference if it is due."""
        super().after_update(step)
        if self.reference is not None:
            self.reference.after_step(step)

    def add_to_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the fingerprint of the initial weights, and the reference if it moves."""
        super().add_to_checkpoint(checkpoint)
        if self.reference is not None:
            checkpoint["reference"] = self.reference.state()

    def restore_from(self, checkpoint: dict[str, Any]) -> None:
        """Restores what `add_to_checkpoint` added."""
        super().restore_from(checkpoint)
        if self.reference is not None:
            self.reference.load_state(checkpoint.get("reference") or {})

    # ---- export

    def heads(self) -> dict[str, Tensor]:
        """The weights beside the language model, by name."""
        return {name: value for name, value in self.named_parameters() if not name.startswith("model.")}

    def save(self, directory: Path, *, model: LM | None = None, **settings: Any) -> None:
        """Writes a folder that `transformers` loads, with the heads that were trained beside the model.

        Override it for a trainer type whose users load something else. Under FSDP2 all ranks have to call this; rank 0
        writes.

        Args:
            directory: Where; new or empty.
            model: A model to write instead of the module's own.
            settings: See `oumi_pl.models.export.export_model`.
        """
        export_model(model or self.causal_lm, directory, heads=self.heads(), **settings)

    # ---- optimizer

    def configure_optimizers(self) -> Any:
        """The optimizer over named groups, and its schedule in optimizer steps.

        Override it with any return value that Lightning documents. `parameter_groups`, `total_steps` and `scheduled`
        are for such methods too.
        """
        self.keep_adapters_in_float32()
        groups = self.parameter_groups()
        if not any(parameter.requires_grad for group in groups for parameter in group["params"]):
            raise UserError("model: no parameter is trainable; look at model.freeze and model.lora")
        optimizer = _optimizer(self.optimizer, groups)
        scale_rates(optimizer)
        # not with float16: Lightning refuses to clip for fused optimizers, which unscale the gradients themselves
        if getattr(self.trainer.precision_plugin, "scaler", None) is None and self.device.type in ("cpu", "cuda"):
            fuse(optimizer)
        total = self.total_steps()
        factor = self.schedule(total - 1, total)
        try:
            float(factor)  # a user's schedule may return any kind of number
        except (TypeError, ValueError, RuntimeError) as error:
            name = type(self.schedule).__name__
            raise UserError(f"model.schedule: {name} gives {factor!r} instead of a number") from error
        for doubt in self.schedule.doubts(total):
            rank_zero_warn(doubt)
        return self.scheduled(optimizer, lambda step: float(self.schedule(step, total)))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The parameters in named groups, with the settings of `groups` and the factors of `layer_decay`.

        Parameters that `freeze` names are in groups too, so that they are trained from the step on at which something
        sets `requires_grad` again; until then optimizers skip them, as they have no gradient.
        """
        named = [(_name_in_model(name), parameter) for name, parameter in self.named_parameters()]
        return parameter_groups(
            named,
            self.causal_lm.vocabulary_weights,
            settings=self.groups,
            factor=self.__layer_factor(),
            frozen=() if self.lora is not None else self.freeze_modules,
        )

    def __layer_factor(self) -> Callable[[str, Tensor], float]:
        model, decay = self.causal_lm, self.layer_decay
        layers = decoder_layers(model) if decay < 1 else []
        depth = {id(p): len(layers) - i for i, layer in enumerate(layers) for p in layer.parameters()}
        head = {id(p) for p in model.head.parameters()}
        embedded = model.base.get_input_embeddings()
        below = {id(p) for p in embedded.parameters()} | {id(p) for p in model.vocabulary_weights} - head
        depth |= dict.fromkeys(below, len(layers) + 1)
        return lambda name, parameter: decay ** depth.get(id(parameter), 0)

    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        trainer = self.trainer
        limits = [trainer.max_steps] if trainer.max_steps > 0 else []
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            # not `estimated_stepping_batches` if possible: it creates the loader before the checkpoint sets its
            # position
            data = self.data
            limits.append(data.updates(trainer.max_epochs) if data else int(trainer.estimated_stepping_batches))
        if not limits:
            raise UserError("trainer: set max_steps or max_epochs, so that the schedule knows how long the run is")
        return min(limits)

    def begin_training(self) -> None:
        """Restores a checkpoint. The first batch is checked only if the run starts at step 0."""
        self.__is_start = self.global_step == 0
        self.__open_reference()  # `LearningRateFinder` trains before `on_fit_start`
        super().begin_training()

    def keep_adapters_in_float32(self) -> None:
        """Casts trained adapters back to float32 after `precision: bf16-true` has cast every parameter."""
        # updates of adapters are often smaller than the resolution of bfloat16
        if self.lora is not None:
            for parameter in self.parameters():
                if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                    parameter.data = parameter.data.float()
            if is_sharded(self):  # FSDP keeps views of the values, which it renews after anything is applied to them
                self.causal_lm._apply(lambda tensor: tensor)

    # ---- predict

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """Completes a batch of prompts: `{row, prompt, completion, reference}` each, beside the columns of its row.

        Rows count from 1. A column with one of these names is kept as `source_NAME`.
        """
        data = self.data
        assert data is not None
        texts = complete(
            self.causal_lm.hf, data.tokenizer, batch["prompts"], stop=data.stop_tokens, **self.generation_settings
        )
        prompts = [data.tokenizer.decode(ids) for ids in batch["prompts"]]
        names = ("row", "prompt", "completion", "reference")
        values = zip(batch["rows"], prompts, texts, batch["references"], strict=True)
        return [
            beside(columns, dict(zip(names, line, strict=True)))
            for columns, line in zip(batch["columns"], values, strict=True)
        ]


def _refuse_quantization(quantization: str | None, unquantized: Sequence[str], model: Any, lora: Any) -> None:
    """Refuses settings of a quantized base that don't go together.

    Raises:
        UserError: names what is missing.
    """
    if quantization is not None and model is None:
        raise UserError("model.quantization: there are no pretrained weights to load in fewer bits; name a model")
    if quantization is not None and lora is None:
        raise UserError("model.quantization: quantized weights can't be trained; add `lora: {r: 16}`")
    if unquantized and quantization is None:
        raise UserError("model.unquantized: nothing is quantized; set quantization: nf4, or leave it out")


def _refuse_together(*, quantization: str | None, fp8: FP8, compile: bool, policy: bool | Recomputation) -> None:
    """Refuses settings of layers of which one can be had.

    Raises:
        UserError: names them.
    """
    if fp8 and quantization is not None:
        raise UserError("model.fp8 can't be had with model.quantization: leave one of them out")
    if compile:
        refuse_compiled(policy)


UNFIT = {
    StochasticWeightAveraging: "copies the weights before they are built, and would average nothing; take "
    "WeightAveraging, or oumi_pl.callbacks.ema.EMA",
    ModelPruning: "looks for weights before they are built, and would find none; leave it out",
    BackboneFinetuning: "freezes the `backbone` of a module, and language models have none; take model.freeze",
    BatchSizeFinder: "changes the rows of an update after the schedule has counted the updates; `fit --dry_run` "
    "measures the memory of a batch_size, and a run that lacks memory says which one fits",
}
"""Callbacks of Lightning that can't work -> why."""
BASES = (BaseFinetuning, BasePredictionWriter, Checkpoint, ProgressBar)
"""Base classes for callbacks, which do nothing by themselves, or crash."""


def refuse_unfit_callbacks(callbacks: Sequence[Any]) -> None:
    """Refuses callbacks that expect the model before it is built, change the plan during the run, or are base classes.

    Raises:
        UserError: there is one.
    """
    for callback in callbacks:
        if type(callback) in BASES:
            raise UserError(f"trainer.callbacks: {type(callback).__name__} is a base class; name a subclass of it")
        for kind, why in UNFIT.items():
            alone = getattr(callback, "_early_exit", False)  # `Tuner.scale_batch_size`, which trains nothing
            if isinstance(callback, kind) and not alone:
                raise UserError(f"trainer.callbacks: {type(callback).__name__} {why}")


def _name_in_model(name: str) -> str:
    """The name of a parameter in the Hugging Face model; of one beside it, the name itself."""
    return name.removeprefix("model.hf.").removeprefix("base_model.model.").removeprefix("body.plain.")


def _optimizer(optimizer: OptimizerCallable, groups: list[dict[str, Any]]) -> Optimizer:
    # torch adds the defaults to the groups that it is given
    own = any(group.keys() - {"params", "name", "weight_decay"} for group in groups)
    parameters = [parameter for group in groups for parameter in group["params"]]
    try:
        return optimizer(groups)
    except ValueError as error:
        if "parameter groups" in str(error) and not own:  # LBFGS takes none
            return optimizer(parameters)
        raise UserError(f"model.optimizer: {error}") from error
    except TypeError as error:
        raise UserError(f"model.optimizer: {error}") from error
