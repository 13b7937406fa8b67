"""Score rows with a reward model: prompts with a response, conversations, or pairs of responses."""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from oumi_pl.commands.parser import Parser
from oumi_pl.errors import UserError
from oumi_pl.runs.folders import half_of
from oumi_pl.terminal.screen import meanwhile
from oumi_pl.terminal.text import echo

if TYPE_CHECKING:
    from oumi_pl.data.reward import TokenizeResponses
    from oumi_pl.types import Example, Record

AT_ONCE = 512
"""Rows read at once; within these, batches hold rows of similar length."""
COLUMNS = ("reward",)
PAIR_COLUMNS = ("reward_chosen", "reward_rejected")
EPILOG = """\
Each line of the output is the row with its reward: `reward`, or `reward_chosen` and `reward_rejected` for a pair.
A row is in any format that SFTData or DPOData reads; other columns are kept.

  oumi_pl score --model runs/quickstart-reward/model --input bundled/preferences/heldout --output scores.jsonl
"""


class Scorer(NamedTuple):
    """A reward model with what it takes to score rows."""

    model: Any
    """An `oumi_pl.models.lm.ScoringLM`."""
    tokenize: "TokenizeResponses"
    pad: int | None


def main(args: list[str]) -> int:
    """Runs the command; returns its exit code."""
    options = _options(args)
    output = options.output.expanduser()
    if output.exists() or output.is_symlink():
        raise UserError(f"--output: {output} exists; name another file")
    if not output.parent.is_dir():
        raise UserError(f"--output: there is no folder {output.parent}")
    from oumi_pl.data.sources import Source, rows

    lines = rows(Source(options.input))  # a misspelt name is reported before the model is loaded
    with meanwhile("loading the model"):
        scorer = load(options.model, options.max_length, options.overflow, options.trust_remote_code)
    rewards: list[list[float]] = []
    half = half_of(output)
    try:
        with half.open("x", encoding="utf-8") as out:
            for row, scores in scored(scorer, lines, options.batch_size, options.input):
                names = PAIR_COLUMNS if len(scores) == 2 else COLUMNS
                line = row | dict(zip(names, scores, strict=True))
                out.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
                rewards.append(scores)
        half.replace(output)
    except OSError as error:
        raise UserError(f"--output: can't write to {output}: {error.strerror}") from error
    finally:
        half.unlink(missing_ok=True)
    echo(f"{summary(rewards)} -> {output}")
    return 0


def summary(rewards: list[list[float]]) -> str:
    """What was scored, in a line."""
    pairs = [row for row in rewards if len(row) == 2]
    values = [value for row in rewards for value in row]
    mean = sum(values) / len(values)
    text = f"{len(rewards):,} rows, rewards from {min(values):.4g} to {max(values):.4g}, mean {mean:.4g}"
    if not pairs:
        return text
    right = sum(chosen > rejected for chosen, rejected in pairs) / len(pairs)
    return f"{text}; {right:.1%} of {len(pairs):,} pairs have the larger reward for the chosen response"


def load(name: str, max_length: int | None, overflow: Any, trust_remote_code: bool = False) -> Scorer:
    """Loads a reward model by folder or hub id, in its saved precision; an adapter is merged into its base.

    Args:
        name: Folder or hub id.
        max_length: Longest row in tokens; that of the model when left out.
        overflow: What happens to longer rows; see `RewardData`.
        trust_remote_code: Run code that comes with the model.

    Raises:
        UserError: it can't be loaded, or is no reward model.
    """
    import torch

    from oumi_pl.data.reward import RewardData
    from oumi_pl.models.build import build_config
    from oumi_pl.models.hub import locate
    from oumi_pl.models.lm import choose_layout
    from oumi_pl.modules.reward import Reward
    from oumi_pl.terminal.screen import quiet

    quiet()
    path = locate(name, "--model")
    _refuse_other_models(name, Path(path), trust_remote_code)
    module = Reward(path, dtype="auto", trust_remote_code=trust_remote_code)
    data = RewardData(tokenizer=path, max_length=max_length or sys.maxsize, overflow=overflow)
    data.trust_remote_code = trust_remote_code
    model = module.assemble(data.tokenizer, data.added_tokens, branching=True)
    pad = data.tokenizer.pad_token_id
    if (Path(path) / "config.json").is_file():  # else an adapter, whose base knows of no padding
        pad = build_config(path, None, None, trust_remote_code=trust_remote_code).get_text_config().pad_token_id
    positions = getattr(model.base.config.get_text_config(), "max_position_embeddings", None)
    if max_length is None and positions:
        data.max_length = positions
    if torch.cuda.is_available():
        model.to("cuda")
        model.layout, model.layout_reason = choose_layout(model.hf)  # its kernels are others
    model.refuse_unknown_logits()
    return Scorer(model.eval(), data.tokenize, pad if pad is not None else data.tokenizer.pad_token_id)


def _refuse_other_models(name: str, path: Path, trust_remote_code: bool) -> None:
    """Refuses a causal LM, whose scoring head would be random."""
    from oumi_pl.models.build import build_config

    adapter = path / "adapter_config.json"
    from oumi_pl.models.build import read_adapter_config

    if adapter.is_file() and not (path / "config.json").is_file():
        kind, fits = "an adapter of a language model", read_adapter_config(path).get("task_type") == "SEQ_CLS"
    else:
        config = build_config(str(path) if path.is_dir() else name, None, None, trust_remote_code=trust_remote_code)
        architecture = next(iter(config.architectures or ()), "a model without an architecture")
        kind, fits = architecture, architecture.endswith("ForSequenceClassification")
    if not fits:
        raise UserError(
            f"--model: {name} is {kind}, not a reward model; train one from it: "
            f"oumi_pl fit --config quickstart/reward --model.model {name}"
        )


def scored(scorer: Scorer, lines: Any, batch_size: int, name: str) -> Iterator[tuple[dict[str, Any], list[float]]]:
    """Yields each row with its scores: one, or those of the chosen and the rejected response.

    Args:
        scorer: The reward model.
        lines: Rows with their origin (file and line).
        batch_size: Rows per batch.
        name: Of the source, for the progress display.

    Raises:
        UserError: a row can't be read, or is too long; names its file and line.
    """
    from oumi_pl.terminal.screen import track

    rows = track(iter(lines), f"scoring {name}")
    while chunk := list(itertools.islice(rows, AT_ONCE)):
        examples = [_example(scorer, origin, row) for origin, row in chunk]
        order = sorted(range(len(chunk)), key=lambda i: len(examples[i].input_ids))
        scores: dict[int, list[float]] = {}
        for start in range(0, len(order), batch_size):
            ids = order[start : start + batch_size]
            scores |= dict(zip(ids, _scores(scorer, [examples[i] for i in ids]), strict=True))
        yield from ((row, scores[i]) for i, (_, row) in enumerate(chunk))


def _scores(scorer: Scorer, examples: "list[Example]") -> list[list[float]]:
    import torch

    from oumi_pl.data.collate import collate

    device = next(scorer.model.parameters()).device
    batch: Any = collate([([i], [example]) for i, example in enumerate(examples)], 0)
    batch = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    with torch.no_grad():
        values = iter(scorer.model(batch, scorer.model.scores).tolist())
    return [[next(values) for _ in example.segments] for example in examples]


def _example(scorer: Scorer, origin: str, row: dict[str, Any]) -> "Example":
    """A row's response, or both responses of a pair, which share the tokens that they begin with."""
    import numpy as np

    from oumi_pl.data.reward import as_pair, response_ids
    from oumi_pl.types import Example, Preference, Segment

    try:
        record = _record(row)
        responses: Any = [record.chosen, record.rejected] if isinstance(record, Preference) else [record]
        ids = [response_ids(scorer.tokenize, response, scorer.pad) for response in responses]
        if not all(map(len, ids)):
            raise UserError("there is no token to score")
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None
    tokens, segments = as_pair(*ids) if len(ids) == 2 else (ids[0], (Segment(len(ids[0])),))
    return Example(tokens, np.zeros(len(tokens), dtype=bool), segments)


def _record(row: dict[str, Any]) -> "Record | list[Record] | None":
    from oumi_pl.data.formats import FORMATS, find_format
    from oumi_pl.data.preferences import PREFERENCE_FORMATS

    return find_format(row, (*PREFERENCE_FORMATS, *FORMATS))(row)


def _options(args: list[str]) -> argparse.Namespace:
    """Parses the command line.

    Raises:
        UserError: an option is missing or out of range.
    """
    parser = Parser("score", __doc__, epilog=EPILOG)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="a reward model or its adapter: a folder, or a name on the hub")
    add("--input", required=True, metavar="FILE", help="rows: a file, a folder, bundled data, or a name on the hub")
    add("--output", required=True, type=Path, metavar="FILE", help="JSON lines to write, one per row")
    add("--batch_size", type=int, default=8, metavar="N", help="rows per batch (default: 8)")
    add("--max_length", type=int, metavar="N", help="longest row in tokens (default: the model's positions)")
    add(
        "--overflow",
        choices=("error", "truncate", "keep_start"),
        default="error",
        help="stop at a longer row (the default), cut its prompt first, or cut its end",
    )
    add("--trust_remote_code", action="store_true", help="run code that comes with a model")
    options = parser.parse_args(args)
    for name, least in (("batch_size", 1), ("max_length", 2)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name} is {value}, but has to be at least {least}")
    return options
