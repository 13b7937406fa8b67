"""Distillation: trains a student on a teacher's next-token distributions, at the tokens that carry loss."""

from functools import cached_property
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from oumi_pl.attention import NAME
from oumi_pl.errors import UserError
from oumi_pl.losses.distillation import (
    DistillationSums,
    Divergence,
    ForwardKL,
    Outcomes,
    TeacherHead,
    distillation_sums,
    from_columns,
    top_k,
)
from oumi_pl.models.build import DType, build_model, vocabulary
from oumi_pl.models.fingerprint import model_fingerprint
from oumi_pl.models.hub import locate
from oumi_pl.models.lm import LM, States, disable_dropout, with_layout
from oumi_pl.modules.base import LanguageModule
from oumi_pl.modules.reference import WORDS, FrozenModel, Precomputed, Reference, precompute
from oumi_pl.modules.sft import refuse_bad_answers
from oumi_pl.modules.update import Split
from oumi_pl.types import Batch, RunModule, Sums

PIECE = 512
"""Targets whose full teacher distributions are in memory at a time, while their top k are computed."""


class Distill(LanguageModule):
    """Trains a student on a teacher's distributions, normalised by the number of targets. Dropout is off.

    With `top_k`, the teacher's most likely tokens are computed once, before training, and cached on disk: training then
    needs no teacher in memory, and the next run on the same rows reads the cache. All other tokens count as one
    outcome, whose probability is exact. The cache takes `8 k + 4` bytes per target. Without `top_k`, the teacher runs
    beside the student, and all tokens are compared.

    With `RolloutData`, the student learns from completions that it samples itself, in training and in evaluation, so
    that it is corrected where it goes wrong (Agarwal et al. 2023, arXiv:2306.13649: GKD with `lmbda` 1). Prompts need
    no answers then, and completions no reward. `DistillData` alternates between the rows' answers and such completions
    (GKD with any `lmbda`). No gradient passes through the sampling, as in the paper.

    Args:
        model: Hub id or directory of the student; leave it out to start from random weights.
        config: `model_type` and values of a config to start from; with `model`, values to override.
        teacher: Hub id or directory of the teacher. It has to read the same tokens.
        teacher_dtype: Dtype of the teacher's weights; the student's when left out.
        teacher_quantization: Load the teacher in 4 or 8 bits.
        top_k: How many of the teacher's most likely tokens are cached per target; None runs the teacher in training.
        divergence: Divergence of the student from the teacher; `ForwardKL` when left out.
        temperature: Divides the logits of both models before the divergence, above 0. The loss is not multiplied by its
            square (Hinton et al. 2015 do so).
        cross_entropy: Weight of the targets' cross-entropy, from 0 to below 1; the divergence gets the rest.
        kwargs: See `LanguageModule`.
    """

    branching = None
    validation_metrics: tuple[str, ...] = (
        *("val/loss", "val/divergence", "val/nll", "val/perplexity"),
        *("val/mean_token_accuracy", "val/teacher_agreement"),
    )

    def __init__(
        self,
        model: str | None = None,
        config: dict[str, Any] | None = None,
        *,
        teacher: str,
        teacher_dtype: DType | None = None,
        teacher_quantization: Literal["nf4", "int8"] | None = None,
        top_k: int | None = None,
        divergence: Divergence | None = None,
        temperature: float = 1.0,
        cross_entropy: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, config, **kwargs)
        if not temperature > 0:
            raise UserError(f"model.temperature is {temperature}, but has to be above 0")
        if not 0 <= cross_entropy < 1:
            advice = "; for cross-entropy alone use SFT" if cross_entropy == 1 else ""
            raise UserError(f"model.cross_entropy is a share from 0 to below 1, not {cross_entropy}{advice}")
        if top_k is not None and top_k < 1:
            raise UserError(f"model.top_k is {top_k}, but has to be at least 1; leave it out to run the teacher online")
        self.divergence = divergence or ForwardKL()
        self.temperature = temperature
        self.cross_entropy = cross_entropy
        self.reference: Teacher = Teacher(
            self, teacher, teacher_dtype, quantization=teacher_quantization, top_k=top_k, temperature=temperature
        )

    @property
    def tokenizer_name(self) -> str | None:
        """The student's tokenizer; a student from random weights uses the teacher's."""
        return self.model_name or self.reference.name

    def on_model_built(self) -> None:
        """Refuses rows that are labelled as bad answers; see `LanguageModule`.

        Raises:
            UserError: some rows of the data are labelled as bad answers, or what has to be cached is not known before.
        """
        super().on_model_built()
        refuse_bad_answers(self)
        if self.data is not None and self.data.samples and self.reference.top_k is not None:
            raise UserError(
                "model.top_k: the student's own completions can't be read by the teacher in advance; leave it out"
            )

    def advantages(self, rewards: np.ndarray) -> np.ndarray:
        """Zeros: completions are not compared. See `oumi_pl.data.rollouts.Policy`."""
        return np.zeros_like(rewards)

    def recomputed(self, batch: Batch) -> np.ndarray | None:
        """None: the divergence has no ratio of policies."""
        return None

    def penalties(self, batch: Batch) -> np.ndarray:
        """Zeros: there is no reward."""
        return np.zeros(len(batch["segments"]))

    def loss_sums(self, batch: Batch, split: Split) -> Sums:
        """Sums over the targets: `loss`, its terms, and how often student and teacher agree on the likeliest token.

        With `DistillData`, `sampled` counts the targets that the student sampled.
        """
        outcomes = self.reference.outcomes(batch, split)
        head = self.causal_lm.head

        def compute(states: States) -> tuple[DistillationSums, Tensor | None]:
            sums = distillation_sums(
                states.predicting,
                batch["targets"],
                head,
                outcomes,
                self.divergence,
                vocab=self.reference.vocab,
                temperature=self.temperature,
                cross_entropy=self.cross_entropy,
                transform=states.lm.logit_transform,
            )
            return sums, states.router_loss

        out, router_loss = self.causal_lm(batch, compute)
        sums: Sums = out._asdict() | sampled_targets(batch, out.loss)
        return sums if router_loss is None else sums | {"objective": out.loss + router_loss * len(batch["targets"])}

    def metrics(self, sums: Sums, split: Split) -> dict[str, Tensor]:
        """Means per target; in evaluation also the perplexity."""
        means = super().metrics(sums, split)
        means["mean_token_accuracy"] = means.pop("correct")
        means["teacher_agreement"] = means.pop("agreed")
        return means if split == "train" else means | {"perplexity": means["nll"].exp()}


def sampled_targets(batch: Any, loss: Tensor) -> Sums:
    """`sampled`, the number of targets that the student sampled, if the data have others too; else nothing."""
    return {"sampled": loss.new_tensor(len(batch["targets"]) * batch["sampled"])} if "sampled" in batch else {}


class Teacher(Reference):
    """The teacher: a model in memory, or its top tokens from the cache.

    Args:
        module: The student's module.
        name: Hub id or directory.
        dtype: Dtype of its weights; the student's when left out.
        quantization: Load it in 4 or 8 bits.
        top_k: Tokens cached per target; None runs the teacher during training.
        temperature: Divides its logits.
    """

    role = "teacher"

    def __init__(
        self,
        module: RunModule,
        name: str,
        dtype: DType | None,
        *,
        quantization: Literal["nf4", "int8"] | None,
        top_k: int | None,
        temperature: float,
    ) -> None:
        if name in WORDS:  # `initial` and the like name references, not models
            raise UserError(f"model.teacher: {name!r} is no model; name a hub id or a directory")
        super().__init__(module, name, dtype, user="distillation")
        self.kind = "online" if top_k is None else "precomputed"
        self.quantization = quantization
        self.top_k = top_k
        self.temperature = temperature

    @cached_property
    def vocab(self) -> int:
        """Number of tokens. Models may have more logits, since embeddings are often padded."""
        return vocabulary(self._module.trainer.datamodule.tokenizer)

    def outcomes(self, batch: Batch, split: str) -> Outcomes:
        """The teacher's distributions at the targets of a batch."""
        if isinstance(self.opened, FrozenModel):
            with torch.no_grad():
                return self.opened.model(batch, self._outcomes)
        opened = cast("Precomputed", self.opened)
        return from_columns(opened.logps(batch, split), self.vocab)

    def remember(self, model: LM) -> None:
        """Does nothing: the teacher is another model, so its weights need not be remembered."""

    def open(self, splits: tuple[str, ...], *, in_memory: bool = False) -> None:
        """Loads the teacher, or computes what is missing in the cache.

        Raises:
            UserError: it reads other tokens than the student.
        """
        width = "" if self.top_k is None else f", top {self.top_k} of {self.vocab} tokens per target"
        if self.top_k is None or in_memory:
            self.opened = FrozenModel(self._model())
            self.description = f"teacher: {self.name}, beside the student"
            return
        module, trainer = self._module, self._module.trainer
        data = trainer.datamodule
        k = min(self.top_k, self.vocab)
        parts: dict[str, Any] = {
            "model": model_fingerprint(self.name, "model.teacher"),
            "precision": str(trainer.precision),
            "dtype": self.dtype or module.weights_dtype,
            "quantization": self.quantization,
            "top_k": k,
            "temperature": self.temperature,
            "vocab": self.vocab,
        }
        stores = {
            split: data.reference_logps(split, parts, 2 * k + 1) for split in splits if data.sources[split] is not None
        }
        missing = trainer.strategy.broadcast(any(store.missing() for store in stores.values()))
        if missing:
            model = self._model()
            # shown before the first is computed, because it may not fit on the disk
            size = sum(store.bytes for store in stores.values()) / 1e9
            what = f"the teacher's distributions ({size:.2g} GB)"
            for split, store in stores.items():
                precompute(trainer, model, split, store, compute=self._columns, what=what)
        before = self.opened.stores if isinstance(self.opened, Precomputed) else {}
        self.opened = Precomputed(before | stores)
        source = "computed before training" if missing else "from the cache"
        self.description = f"teacher: {self.name}, {source}{width}"

    def _outcomes(self, states: States) -> TeacherHead:
        lm = states.lm
        return TeacherHead(states.predicting, lm.head, lm.logit_transform, self.temperature, self.vocab)

    def _columns(self, states: States) -> Tensor:
        k = min(cast("int", self.top_k), self.vocab)
        return top_k(self._outcomes(states), len(states.batch["targets"]), k, PIECE)

    def _model(self) -> LM:
        """Loads the teacher.

        Raises:
            UserError: it reads other tokens than the student.
        """
        module, data = self._module, self._module.trainer.datamodule
        refuse_other_tokens(self.name, data.tokenizer, data.added_tokens)

        def build(packed: bool) -> Any:
            return build_model(
                self.name,
                dtype=self.dtype or module.weights_dtype,
                attn=NAME if packed else None,
                quantization=self.quantization,
                trust_remote_code=module.trust_remote_code,
            )

        model = with_layout(build, data.branching)
        disable_dropout(model)
        rows = cast("int", model.head.out_features)
        if rows < self.vocab:
            raise UserError(
                f"model.teacher: {self.name} has logits for {rows} tokens, and the data's tokenizer has {self.vocab}"
            )
        model.keep_dtypes(cast("Tensor", model.head.weight).dtype)
        model.eval().requires_grad_(False)
        return model if self.quantization else self._placed(model)


def refuse_other_tokens(name: str, tokenizer: Any, added_tokens: Any) -> None:
    """Refuses a teacher whose tokens are not those of the data; a folder without tokenizer is trusted.

    Raises:
        UserError: some tokens have other ids, or one of the two lacks them.
    """
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(locate(name, "model.teacher")).get_vocab()
    except (OSError, ValueError):
        return
    ours = tokenizer.get_vocab()
    in_order = sorted(ours, key=lambda token: ours[token])
    moved = next((token for token in in_order if theirs.get(token, ours[token]) != ours[token]), None)
    lacking = next((token for token in in_order if token not in theirs), None)
    if moved is not None:
        what = f"{moved!r} is {theirs[moved]} there and {ours[moved]} here"
    elif lacking is not None:
        what = f"it lacks {lacking!r}" + ("" if not added_tokens else f" and {len(added_tokens)} added tokens")
    else:
        return
    raise UserError(
        f"model.teacher: {name} reads other tokens than the data's tokenizer ({len(theirs)} there, {len(ours)} here; "
        f"{what}); distributions can only be compared over the same tokens"
    )
