"""Notebooks: the rows of data, the layers of a module, the curves and samples of a run, shown where they are named.

Import this module, and end a cell with a data module, a trainer module, a `History`, `Samples` or a `Record`.
"""

from pathlib import Path
from typing import Any

from oumi_pl.callbacks.history import History
from oumi_pl.callbacks.samples import Samples
from oumi_pl.data.base import TextData
from oumi_pl.data.examples import ExampleData
from oumi_pl.data.pretrain import PretrainData
from oumi_pl.errors import UserError
from oumi_pl.models.sharding import decoder_layers
from oumi_pl.modules.base import LanguageModule
from oumi_pl.preview import examples, page, report, stream
from oumi_pl.preview.pieces import Decoder
from oumi_pl.preview.shown import Preview
from oumi_pl.report.page import framed, inline
from oumi_pl.report.record import Record

__all__ = ["History", "Page", "Record", "Samples", "preview", "run"]


class Page:
    """An HTML page that a notebook shows in a frame of its own, so that its style changes nothing else.

    Args:
        html: The page.
        height: Of the frame, in pixels.
    """

    def __init__(self, html: str, height: int = 420) -> None:
        self.html = html
        self.height = height

    def _repr_html_(self) -> str:
        return framed(self.html, self.height)


def preview(data: TextData, rows: int = 3, split: str = "train", height: int = 420) -> Page:
    """Shows the first rows of a split as the model sees them, and the data report; tokenizes what the cache lacks.

    Raises:
        UserError: the data can't be read, or have no tokenizer.
    """
    data.prepare_data()
    data.setup("fit")
    decoder, packs, shown = Decoder(data.tokenizer), None, []
    if isinstance(data, PretrainData):
        shown = stream.rows(data, split, decoder, rows, None)
    elif isinstance(data, ExampleData):
        shown = [examples.shown(data, split, row, decoder) for row in examples.first(data, split, rows)]
        packs = report.packs(data) if data.capacity is not None and split == "train" else None
    title = f"{type(data).__name__}, {split}"
    content = Preview(title, report.notes(data), shown, packs, report.tables(data), report.histograms(data))
    return Page(page.page(content), height)


def run(folder: str | Path) -> Record:
    """A run folder, which a notebook shows as its report."""
    return Record(Path(folder))


def _data(data: TextData) -> str:
    try:
        return preview(data)._repr_html_()
    except UserError as error:
        return inline(type(data).__name__, [str(error)])


def _module(module: LanguageModule) -> str:
    """Parameters of a module by layer, and which of them are trained."""
    if module.model is None:
        return inline(f"{type(module).__name__} of {module.model_name or 'random weights'}", ["not built yet"])
    model = module.causal_lm
    layers = {id(p): f"layer {i}" for i, layer in enumerate(decoder_layers(model)) for p in layer.parameters()}
    counts: dict[str, list[int]] = {}
    for name, parameter in module.named_parameters():
        label = layers.get(id(parameter), name.removeprefix("model.hf.").removesuffix(".weight"))
        total = counts.setdefault(label, [0, 0])
        total[0] += parameter.numel()
        total[1] += parameter.numel() * parameter.requires_grad
    most = max(total for total, _ in counts.values())
    facts = [f"loss: {type(module.loss).__name__}"] if module.loss is not None else []
    every, trained = (sum(column) for column in zip(*counts.values(), strict=True))
    title = f"{type(module).__name__} of {type(model.base).__name__}: {every:,} parameters, {trained:,} trained"
    bars = [(name, *values, most) for name, values in counts.items()]
    return inline(title, facts, bars=bars, height=min(420, 120 + 30 * len(bars)))


# Data and modules import nothing that draws pages; what draws them is above both.
_representations: dict[Any, Any] = {TextData: _data, LanguageModule: _module}
for _cls, _html in _representations.items():
    _cls._repr_html_ = _html
