"""Complete prompts with an exported model, or with a checkpoint: one, or all of a file."""

import argparse
import json
import secrets
import sys
from pathlib import Path
from typing import Any, NamedTuple

from oumi_pl.commands.export import TRUST
from oumi_pl.commands.parser import Parser
from oumi_pl.errors import UserError
from oumi_pl.terminal.screen import has_colours, meanwhile
from oumi_pl.terminal.text import echo, visible

LONGEST = 256
"""Default for the most tokens of a completion."""
BATCH, VLLM_BATCH = 16, 256
"""Defaults for the prompts of a batch. vLLM divides them itself; after each batch they are in the file."""


class Loaded(NamedTuple):
    """A model that completes prompts."""

    model: Any
    """A Hugging Face model."""
    tokenizer: Any
    stop: list[int]
    """Ids that end a completion, besides EOS and those in the model's generation config."""
    recipe: dict[str, Any] | None = None
    """The recipe that it was trained on, if it is known."""


def main(args: list[str]) -> int:
    """Runs the command; returns its exit code."""
    options = _options(args)
    texts = _texts(options)
    if options.model:
        _refuse_no_model(Path(options.model).expanduser())
    from oumi_pl.commands import bulk
    from oumi_pl.rollouts.metrics import resolve_all
    from oumi_pl.rollouts.sampling import Sampling

    metrics = resolve_all(options.metric, "--metric")
    with meanwhile("loading the model"):
        if options.model:
            loaded = from_folder(options.model, options.trust_remote_code, options.architecture)
        else:
            loaded = from_checkpoint(options.checkpoint.expanduser(), trust=options.trust)
    prompts = _prompts(loaded, texts, options)
    from oumi_pl.models.generation import ends_of

    sampling = Sampling(
        options.max_new_tokens or LONGEST, options.temperature, options.top_p or 1.0, stop=tuple(options.stop)
    )
    seed = options.seed if options.temperature else 0  # a greedy completion draws nothing
    ends = ends_of(loaded.model, loaded.tokenizer, loaded.stop)
    complete = bulk.Completer(loaded.model, loaded.tokenizer, ends, sampling, seed or 0)
    if options.engine == "vllm":
        complete = complete._replace(model=None, served=_served(loaded, prompts, Path(options.model)))
    else:
        import torch

        loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
    if options.output is None:
        _print(complete._replace(seed=secrets.randbits(32) if seed is None else seed), prompts, options)
        return 0
    settings = {
        "model": options.model or str(options.checkpoint),
        "weights": bulk.stamps(Path(options.model or options.checkpoint).expanduser()),
        "engine": options.engine,
        "prompts": bulk.hashed(prompts),
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "stop": options.stop,
        "samples": options.samples,
        "seed": seed,
    }
    part = bulk.Part(options.output, settings)
    lines = bulk.run(
        complete._replace(seed=part.settings["seed"]),
        prompts,
        part,
        options.output,
        metrics,
        samples=options.samples,
        batch_size=options.batch_size,
        logprobs=options.logprobs,
    )
    echo("\n".join(lines))
    return 0


def _served(loaded: Loaded, prompts: list[Any], folder: Path) -> Any:
    """Loads the model into vLLM, which takes most of the memory of a GPU.

    Raises:
        UserError: vLLM is not installed, or can't load it.
    """
    import torch

    from oumi_pl.commands.serving import Served
    from oumi_pl.rollouts.vllm import CACHE, LOGPROBS_MODE

    dtype = str(next(p.dtype for p in loaded.model.parameters() if p.is_floating_point())).removeprefix("torch.")
    options: dict[str, Any] = {"generation_config": "vllm", "logprobs_mode": LOGPROBS_MODE, "dtype": dtype}
    if not torch.cuda.is_available():
        # on CPUs, vLLM fails if a prompt with a seed is split
        options |= {"kv_cache_memory_bytes": CACHE, "enforce_eager": True, "enable_chunked_prefill": False}
    longest = max(len(prompt.ids) + prompt.limit for prompt in prompts)
    with meanwhile("loading the model into vLLM"):
        return Served(folder.expanduser(), longest, **options)


def _print(complete: Any, prompts: list[Any], options: argparse.Namespace) -> None:
    """Prints completions: on a terminal while they are generated, one after the other, and else in batches."""
    from oumi_pl.commands import bulk

    if options.json or complete.served is not None or not sys.stdout.isatty():
        for prompt, answer in bulk.in_order(complete, prompts, options.samples, options.batch_size):
            values = answer.values(samples=options.samples > 1, logprobs=options.logprobs)
            values.pop("row")
            # on a terminal, ASCII: JSON escapes only some of the characters that control one
            is_ascii = sys.stdout.isatty()
            line = json.dumps(bulk.beside(prompt.row, values), ensure_ascii=is_ascii, default=str)
            print(line if options.json else answer.completion, flush=True)
        return
    chat = is_chat(complete.tokenizer, options.raw)
    items = [(row, s, prompt) for row, prompt in enumerate(prompts, 1) for s in range(1, options.samples + 1)]
    for i, item in enumerate(items):
        print("\n" * (i > 0) + _dim(visible(item[2].text)), end="\n" if chat else "", flush=True)
        try:
            (answer,) = complete([item], on_text=_write)
        except KeyboardInterrupt:
            print()  # ends the line of the unfinished completion
            raise
        print("" if answer.completion else _dim("(nothing)"))


def from_folder(name: str, trust_remote_code: bool = False, architecture: str | None = None) -> Loaded:
    """Loads a model by folder or hub id in its saved precision; a LoRA adapter is loaded on its base.

    Args:
        name: The folder or id.
        trust_remote_code: Run code that came with it.
        architecture: Class path of the model, if it is one of the user's own.

    Raises:
        UserError: the model can't be loaded, or lacks weights.
    """
    from oumi_pl.errors import reason
    from oumi_pl.models.hub import locate
    from oumi_pl.terminal.screen import quiet

    quiet()
    path = locate(name, "--model")
    adapter = Path(path) / "adapter_config.json"
    from oumi_pl.models.build import read_adapter_config, refuse_invalid_token_ids
    from oumi_pl.runs.checksums import refuse_damaged_weights

    refuse_damaged_weights(Path(path), "--model")
    if adapter.is_file() and (base := read_adapter_config(Path(path)).get("base_model_name_or_path")):
        key = f"--model: the base of the adapter {name}"
        refuse_damaged_weights(Path(locate(base, key)), key)
    if architecture is not None:
        from oumi_pl.models.architectures import register_architecture

        register_architecture(architecture)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # missing weights are reported below
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        load: Any = AutoModelForCausalLM.from_pretrained
        model, info = load(path, dtype="auto", trust_remote_code=trust_remote_code, output_loading_info=True)
    except Exception as error:  # files and code from the hub can fail in any way
        if "trust_remote_code" in str(error):
            raise UserError(
                f"--model: {name} comes with its own code; if you trust it, add --trust_remote_code"
            ) from error
        raise UserError(f"--model: can't load {name}: {reason(error)}") from error
    if not isinstance(tokenizer.model_max_length, int | float):
        raise UserError(f"--model: model_max_length in the tokenizer_config.json of {name} is not a number")
    refuse_invalid_token_ids(model, "--model", name)
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"--model: {name} lacks {len(missing)} of the model's weights, first {missing[0]}")
    return Loaded(model, tokenizer, [], _recipe_of(Path(name).expanduser().absolute()))


def _recipe_of(model: Path) -> dict[str, Any] | None:
    """The recipe of the run that exported a model folder, if it is still in the run's folder."""
    from oumi_pl.runs.folders import CONFIG, RUN

    if not all((model.parent / name).is_file() for name in (RUN, CONFIG)):
        return None
    import yaml

    return yaml.safe_load((model.parent / CONFIG).read_text(encoding="utf-8"))


def from_checkpoint(path: Path, *, trust: bool = False) -> Loaded:
    """Loads the model of a checkpoint; for a run folder, of its best checkpoint, else its newest.

    Args:
        path: The file or folder.
        trust: Run code outside the package that the checkpoint's recipe names.

    Raises:
        UserError: the checkpoint can't be read, its base can't be loaded, or the model does not complete prompts.
    """
    from oumi_pl.commands.export import built, find

    checkpoint = find(path)
    module, data, config, _ = built(checkpoint, trust=trust)
    if not module.generates:
        raise UserError(f"--checkpoint: {checkpoint} is of {type(module).__name__}, which does not complete prompts")
    return Loaded(module.causal_lm.hf, data.tokenizer, data.stop_tokens, config)


def is_chat(tokenizer: Any, raw: bool) -> bool:
    """Whether prompts are sent as turns of a user."""
    return bool(tokenizer.chat_template) and not raw


def prompt_ids(tokenizer: Any, prompt: str, system: str | None = None, raw: bool = False) -> list[int]:
    """The ids of a prompt: a user's turn if the tokenizer has a chat template, else plain text.

    Raises:
        UserError: the template refuses the prompt, or `system` is set without a template.
    """
    from oumi_pl.types import Conversation

    return record_ids(tokenizer, Conversation(({"role": "user", "content": prompt},)), system, raw)


def record_ids(
    tokenizer: Any,
    record: Any,
    system: str | None = None,
    raw: bool = False,
    variables: dict[str, Any] | None = None,
) -> list[int]:
    """The ids of a record's prompt, as in training rows. A user's only turn is plain text without a chat template.

    Args:
        tokenizer: The tokenizer.
        record: A conversation, a text or a preference.
        system: A system turn for conversations that begin with none.
        raw: Do not use the chat template.
        variables: Variables of the chat template.

    Raises:
        UserError: the template refuses the turns, or there is none and they are not a user's only one.
    """
    from dataclasses import replace

    from oumi_pl.data.rendering import ChatRenderer
    from oumi_pl.data.template import adds_bos
    from oumi_pl.data.tokenize import refuse_long
    from oumi_pl.types import Conversation, Preference

    if isinstance(record, Preference):
        record = record.chosen
    if not isinstance(record, Conversation):
        refuse_long(len(record.prompt or record.text))
        return list(tokenizer(record.prompt or record.text)["input_ids"])
    turns = record.messages
    border = record.prompt_messages
    turns = turns[: len(turns) - (turns[-1]["role"] == "assistant") if border is None else border]
    refuse_long(sum(len(turn["content"] or "") for turn in turns))
    if not is_chat(tokenizer, raw):
        if system is not None:
            raise UserError("--system: this tokenizer has no chat template, so there is no place for a system turn")
        if len(turns) != 1 or turns[0]["role"] != "user" or record.tools:
            why = "--raw leaves it out" if raw else "this tokenizer has none"
            raise UserError(f"several turns, a system turn or tools need a chat template, and {why}")
        return list(tokenizer(turns[0]["content"])["input_ids"])
    if system is not None and turns[0]["role"] != "system":
        turns = ({"role": "system", "content": system}, *turns)
    try:
        text = ChatRenderer(tokenizer, variables).prompt(replace(record, messages=turns), len(turns))
    except UserError as error:
        raise UserError(f"{error}; leave the template out with --raw") from error
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    # training rows begin with BOS, even if the template does not write it
    lacks_bos = adds_bos(tokenizer) and ids[:1] != [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id, *ids] if lacks_bos else ids


def _dim(text: str) -> str:
    return f"\033[2m{text}\033[0m" if has_colours(sys.stdout) else text


def _write(text: str) -> None:
    print(visible(text), end="", flush=True)


def _options(args: list[str]) -> argparse.Namespace:
    """Parses the command line.

    Raises:
        UserError: options are out of range, or contradict each other.
    """
    parser = Parser("generate", __doc__)
    for add in (_add_model, _add_prompts, _add_sampling, _add_output):
        add(parser)
    options = parser.parse_args(args)
    if options.batch_size is None:
        options.batch_size = VLLM_BATCH if options.engine == "vllm" else BATCH
    _check(options)
    if options.output is not None:
        options.output = _checked_output(options.output.expanduser())
    return options


def _add_model(parser: Parser) -> None:
    parser.add_argument("--model", metavar="DIR", help="a model or LoRA adapter: a folder, or a name on the hub")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="a .ckpt file, or a run folder: its best",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with a model")
    parser.add_argument("--trust", action="store_true", help=TRUST)
    parser.add_argument("--architecture", metavar="CLASS", help="class path of a model of your own, of --model")


def _add_prompts(parser: Parser) -> None:
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be repeated")
    parser.add_argument(
        "--file",
        metavar="FILE",
        help="prompts: rows of .jsonl, .csv or .parquet with a prompt, turns, or the columns that the recipe names; "
        "else one per line; - reads standard input",
    )
    parser.add_argument(
        "--columns",
        action="append",
        default=[],
        metavar="FIELD=COLUMN",
        help="which of your columns is the format's field, as in prompt=ticket; may be repeated",
    )
    parser.add_argument("--format", metavar="NAME", help="format of the rows, as in a recipe")
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="COLUMN", help="a column that is no part of the prompt"
    )
    parser.add_argument("--system", metavar="TEXT", help="a system turn before the prompt")
    parser.add_argument("--raw", action="store_true", help="send the prompt as plain text, without the chat template")


def _add_sampling(parser: Parser) -> None:
    parser.add_argument(
        "--engine",
        choices=("generate", "vllm"),
        default="generate",
        help="what completes: transformers' generate (default), or vLLM with the folder --model (the extra `vllm`)",
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        metavar="N",
        help=f"prompts per batch (default: {BATCH}; {VLLM_BATCH} with vllm)",
    )
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="completions per prompt (default: 1)")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end a completion before this text; may be repeated",
    )
    parser.add_argument("--max_new_tokens", type=int, metavar="N", help=f"longest completion (default: {LONGEST})")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (the default) is greedy")
    parser.add_argument(
        "--top_p",
        type=float,
        metavar="P",
        help="sample from the likeliest tokens that add up to P",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="seed of sampling")


def _add_output(parser: Parser) -> None:
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="a .jsonl or .csv file to write, with all columns of each row; a repeated command continues it",
    )
    parser.add_argument(
        "--logprobs",
        action="store_true",
        help="write the log-probability of each token, as it was sampled (greedy: as the model has it), and their sum",
    )
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="FUNCTION",
        help="path of a function (completion, row) -> number or mapping, or a built-in one: exact_match, rouge_l, "
        "chrf, regex:PATTERN; writes its values, and prints their means with 95 %% intervals; may be repeated; the "
        "callback Metrics logs the same ones while training",
    )
    parser.add_argument("--json", action="store_true", help="print a line of JSON per completion, with all columns")


def _check(options: argparse.Namespace) -> None:
    if bool(options.model) == bool(options.checkpoint):
        both = "name one of the two" if options.model else "name --model DIR or --checkpoint FILE"
        raise UserError(f"generate: {both}; see: oumi_pl generate --help")
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens is {options.max_new_tokens}, but has to be at least 1")
    if options.temperature < 0:
        raise UserError(f"--temperature is {options.temperature:g}, but can't be below 0")
    if options.top_p is not None and not 0 < options.top_p <= 1:
        raise UserError(f"--top_p is {options.top_p:g}, but has to be above 0 and at most 1")
    if options.top_p is not None and options.temperature == 0:
        raise UserError("--top_p is for sampling: add --temperature, since completions are greedy without it")
    if options.engine == "vllm" and (not options.model or options.architecture):
        raise UserError(
            "--engine vllm takes an exported model, --model DIR; of a checkpoint: oumi_pl export --checkpoint FILE "
            "--output DIR"
        )
    if options.raw and options.system is not None:
        raise UserError("--system needs the chat template, which --raw leaves out")
    _check_bulk(options)


def _check_bulk(options: argparse.Namespace) -> None:
    for name in ("samples", "batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}, but has to be at least 1")
    if options.samples > 1 and options.temperature == 0:
        raise UserError("--samples: greedy completions of a prompt are all the same; add --temperature")
    if options.metric and options.output is None:
        raise UserError("--metric: its values are written beside the completions; add --output FILE")
    for column in options.columns:
        if not all(column.partition("=")):
            raise UserError(f"--columns: {column!r} is no FIELD=COLUMN, as in prompt=ticket")


def _checked_output(path: Path) -> Path:
    if path.suffix not in (".jsonl", ".csv"):
        raise UserError(f"--output: {path} has to end in .jsonl or .csv")
    if path.exists():
        raise UserError(f"--output: {path} exists; name another file")
    if not path.parent.is_dir():
        raise UserError(f"--output: there is no folder {path.parent}")
    return path


def _texts(options: argparse.Namespace) -> list[str]:
    """The prompts of the options and of a file of lines."""
    texts = list(options.prompt)
    if any(not text.strip() for text in texts):
        raise UserError("--prompt is empty")
    for text in texts:
        _refuse_no_text(text, "--prompt")
    if options.file is None and not texts:
        raise UserError("generate: name a --prompt TEXT, or a --file of prompts (- for lines of the standard input)")
    if options.file is None or _has_rows(options.file):
        return texts
    try:
        text = sys.stdin.read() if options.file == "-" else Path(options.file).expanduser().read_text("utf-8")
    except OSError as error:
        raise UserError(f"--file: {options.file} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--file: {options.file} is not UTF-8 text") from error
    _refuse_no_text(text, f"--file: {options.file}")
    texts += [line for line in text.removeprefix("\ufeff").split("\n") if line.strip()]
    if not texts:
        raise UserError(f"--file: {options.file} holds no prompt")
    return texts


def _refuse_no_text(text: str, where: str) -> None:
    """Refuses bytes that are no text: Python reads them from a command line as half surrogate pairs.

    Raises:
        UserError: there is such a byte, or a zero byte.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} is not UTF-8 text") from error
    if "\0" in text:
        raise UserError(f"{where} holds binary data (a zero byte)")


def _has_rows(file: str) -> bool:
    """Whether a file holds rows with columns; else its lines are prompts.

    Raises:
        UserError: there is no such file.
    """
    path = Path(file).expanduser()
    suffixes = [suffix for suffix in path.suffixes if suffix not in (".gz", ".zst")]
    if not suffixes or suffixes[-1] not in (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".arrow"):
        return path.is_dir() or file.startswith("bundled/")
    if not path.exists():
        raise UserError(f"--file: {file} can't be read: No such file or directory")
    return True


def _prompts(loaded: Loaded, texts: list[str], options: argparse.Namespace) -> list[Any]:
    """The prompts of the options and of the rows of the file.

    Raises:
        UserError: a row has no prompt, or one that leaves no room in the model's positions; names it.
    """
    from oumi_pl.commands.bulk import Prompt
    from oumi_pl.types import Conversation, Text

    variables = dict(((loaded.recipe or {}).get("data", {}).get("init_args") or {}).get("template_variables") or {})
    items: list[tuple[str, dict[str, Any], Any]] = []
    items += [("--prompt", {"prompt": t}, Conversation(({"role": "user", "content": t},))) for t in texts]
    if options.file is not None and _has_rows(options.file):
        items += _records(loaded, options)
    positions = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    prompts, cut = [], []
    for origin, row, record in items:
        own = dict(getattr(record, "template_variables", {}))
        try:
            ids = record_ids(loaded.tokenizer, record, options.system, options.raw, variables | own)
        except UserError as error:
            raise UserError(str(error) if origin == "--prompt" else f"{origin}: {error}") from error
        if not ids:
            raise UserError(f"{origin}: the prompt is empty, and the model needs a token to begin with")
        if positions is not None and len(ids) >= positions:
            raise UserError(f"{origin}: it has {len(ids):,} tokens, but the model has only {positions:,} positions")
        limit = options.max_new_tokens or LONGEST
        if positions is not None and limit > positions - len(ids):
            limit = positions - len(ids)
            cut.append(limit)
        prompts.append(Prompt(row, _shown(record), ids, limit))
    if cut and options.max_new_tokens is not None:
        most = f"the prompt leaves {min(cut):,} of the model's {positions:,} positions, so completions end there"
        echo(f"note: {most}" + (f" (and {len(cut) - 1:,} more prompts)" if len(cut) > 1 else ""), file=sys.stderr)
    if is_chat(loaded.tokenizer, options.raw) and any(isinstance(record, Text) for _, _, record in items):
        print(
            "note: rows of `text`, or of `prompt` and `completion`, are sent as plain text, as they are trained: "
            "without the chat template",
            file=sys.stderr,
        )
    return prompts


def _shown(record: Any) -> str:
    """What the terminal shows of a prompt: its last turn."""
    from oumi_pl.types import Conversation, Preference

    if isinstance(record, Preference):
        record = record.chosen
    if not isinstance(record, Conversation):
        return record.prompt or record.text
    return next((turn["content"] or "" for turn in reversed(record.messages) if turn["role"] != "assistant"), "")


def _records(loaded: Loaded, options: argparse.Namespace) -> list[tuple[str, dict[str, Any], Any]]:
    """Origin, columns and record of each row of the file, read as the recipe's training rows are."""
    from oumi_pl.data.prompts import PROMPT_FORMATS, PromptsWithRows
    from oumi_pl.data.sources import Source, rows

    read = list(rows(Source(options.file)))
    recipe = _reading(loaded.recipe)
    # the recipe's columns of answers need not be there
    columns = {field: name for field, name in (recipe.get("columns") or {}).items() if name in read[0][1]}
    columns |= dict(option.split("=", 1) for option in options.columns)
    ignore = [*(recipe.get("ignore") or ()), *options.ignore]
    form = options.format or _own_format(recipe.get("format"), options.trust)
    reader = PromptsWithRows(
        Source(options.file, columns=columns or None, ignore=ignore or None, format=form), PROMPT_FORMATS, mixed=True
    )
    items = []
    for origin, row in read:
        try:
            items.append((origin, row, reader.record(row).record))  # type: ignore[union-attr]
        except UserError as error:
            raise UserError(f"{origin}: {error}") from error
    return items


def _reading(recipe: dict[str, Any] | None) -> dict[str, Any]:
    """How a recipe reads its training rows, if it reads all sources in the same way: `columns`, `format`, `ignore`."""
    sources = (((recipe or {}).get("data") or {}).get("init_args") or {}).get("train")
    how = []
    for source in sources if isinstance(sources, list) else [sources]:
        arguments = source.get("init_args", source) if isinstance(source, dict) else {}
        how.append({name: arguments.get(name) for name in ("columns", "format", "ignore")})
    return how[0] if all(one == how[0] for one in how) else {}


def _own_format(name: str | None, trust: bool) -> str | None:
    """The format of a model's recipe, which may have come with the model.

    Raises:
        UserError: it is a function outside the package, and `trust` is not set.
    """
    from oumi_pl.runs.received import foreign_functions

    if not trust and any(foreign_functions(name)):
        raise UserError(
            f"--file: the recipe beside the model reads rows with the function {name}; if you trust where the model "
            "comes from, add --trust, or name a --format"
        )
    return name


def _refuse_no_model(path: Path) -> None:
    """Checks that an existing path is a model folder.

    Raises:
        UserError: it is something else; says where the model may be.
    """
    if path.is_file():
        raise UserError(f"--model: {path} is a file; for a checkpoint, use --checkpoint {path}")
    if not path.is_dir():
        return  # a name on the hub, perhaps
    if (path / "run.json").is_file():
        model = f"--model {path / 'model'}" if (path / "model").is_dir() else f"--checkpoint {path}"
        raise UserError(f"--model: {path} is a run folder; its model: {model}")
    if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise UserError(f"--model: {path} is not a model folder: it has no config.json")
    if not any([*path.glob("*.safetensors"), *path.glob("*.bin")]):
        raise UserError(f"--model: no weights in {path}")
