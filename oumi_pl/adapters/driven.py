"""What the engines' trainers are told to do otherwise, and why. Everything else is theirs."""

from pathlib import Path
from typing import Any

from torch import Tensor

from oumi_pl.adapters import position
from oumi_pl.adapters.batches import Batches, EngineBatch
from oumi_pl.adapters.course import Course


class Driven:
    """Put before `transformers.Trainer`, or a trainer that TRL made of it."""

    course: Course
    update_batches: list[EngineBatch]
    """The micro-batches of the update that is being trained on, as the model reads them."""
    native_batches: list[Any]
    """The same as our loader gave them."""

    def follow(self, course: Course) -> None:
        """Takes up what goes on beside the loop. Called once, before `train`."""
        self.course = course
        self.update_batches, self.native_batches = [], []
        self._done = 0
        self._seen: list[Tensor] | None = None
        for model in self._watched():
            model.register_forward_hook(self._look)

    def _watched(self) -> list[Any]:
        return [self.model]  # type: ignore[attr-defined]

    def _look(self, model: Any, args: Any, output: Any) -> None:
        """Keeps what our metrics need of the model's output, while the engine trains: the output itself is large."""
        if self._seen is not None:
            self._seen.append(self.seen(output, self.native_batches[self._done]))

    def seen(self, output: Any, native: Any) -> Tensor:
        """How many targets the model found most likely. TRL's output says where; else the logits do."""
        hits = getattr(output, "is_top1", None)
        if hits is None:
            hits = output.logits.detach().argmax(-1) == native["labels"].to(output.logits.device)
        return hits.sum()

    def measure(self, native: Any, inputs: EngineBatch, seen: list[Tensor]) -> None:
        """Adds a micro-batch to the sums of the update."""
        self.course.measure_tokens(native, seen[0])

    def get_train_dataloader(self) -> Batches:
        """Our batches in our order: the engine would shuffle and collate its own way."""
        return self.course.batches

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As the engine does, which fetches all micro-batches of an update at once; remembers them."""
        fetched = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        self.update_batches, self.native_batches = fetched[0], self.course.batches.take()
        self._done = 0
        return fetched

    def training_step(self, model: Any, inputs: EngineBatch, *args: Any, **kwargs: Any) -> Tensor:
        """As the engine does; counts what the metrics are made of."""
        self._seen = []
        try:
            loss = super().training_step(model, dict(inputs), *args, **kwargs)  # type: ignore[misc]
            inputs = {name: value.to(loss.device) for name, value in inputs.items()}
            self.measure(self.native_batches[self._done], inputs, self._seen)
        finally:
            self._seen = None
        self._done += 1
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validates by our sums, which don't depend on how held-out rows are cut: engines average means."""
        engine: Any = self
        with engine.accelerator.autocast():
            metrics = self.course.validate()
        engine.control = engine.callback_handler.on_evaluate(engine.args, engine.state, engine.control, metrics)
        return metrics

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As the engine does, after what it does not keep: its own last file then says that all is there."""
        engine: Any = self
        course = self.course
        folder = Path(engine.args.output_dir) / f"checkpoint-{engine.state.global_step}"
        position.save(folder, course.lightning, course.row, course.checkpoints)
        super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: the export writes one that knows the recipe."""


class DrivenOnPairs(Driven):
    """The same for `trl.DPOTrainer`."""

    def _watched(self) -> list[Any]:
        engine: Any = self
        return [engine.model] if engine.ref_model is None else [engine.model, engine.ref_model]

    def seen(self, output: Any, native: Any) -> Tensor:
        """The log-probabilities of the tokens, first under the policy, then under the reference."""
        return output.log_probs.detach()

    def measure(self, native: Any, inputs: EngineBatch, seen: list[Tensor]) -> None:
        """Adds a micro-batch to the sums of the update, whose metrics are then those of our loss."""
        self.course.measure_pairs(native, inputs, seen)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """As TRL does, weighed by pairs.

        TRL takes the mean over a micro-batch and then over the micro-batches of an update, so that the pairs of a short
        one would count for more. With this share an update's loss is the mean over all its pairs; where all
        micro-batches have as many, it is 1.
        """
        loss = super().compute_loss(*args, **kwargs)  # type: ignore[misc]
        counts = [len(batch["sample_ids"]) for batch in self.native_batches]
        return loss * (counts[self._done] * len(counts) / sum(counts))

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """The stand-in for a dataset as it is: rows are tokenized already, and come from our loader."""
        return dataset
