"""Complete prompts with an exported model, or with a checkpoint."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from oumi_pl.commands.export import TRUST
from oumi_pl.commands.parser import Parser
from oumi_pl.errors import UserError
from oumi_pl.terminal.screen import has_colours, meanwhile, visible

LONGEST = 256
"""Default for the most tokens of a completion."""


class Loaded(NamedTuple):
    """A model that completes prompts."""

    model: Any
    """A Hugging Face model."""
    tokenizer: Any
    stop: list[int]
    """Ids that end a completion, besides EOS and those in the model's generation config."""


def main(args: list[str]) -> int:
    """Runs the command; returns its exit code."""
    options = _options(args)
    prompts = _prompts(options)
    if options.model:
        _refuse_no_model(Path(options.model).expanduser())
    with meanwhile("loading the model"):
        if options.model:
            loaded = from_folder(options.model, options.trust_remote_code, options.architecture)
        else:
            loaded = from_checkpoint(options.checkpoint.expanduser(), trust=options.trust)
    ids = [prompt_ids(loaded.tokenizer, prompt, options.system, options.raw) for prompt in prompts]
    limits = [_limit(loaded.model, len(one), options.max_new_tokens) for one in ids]
    import torch

    from oumi_pl.models.generation import complete

    loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
    if options.seed is not None:
        torch.manual_seed(options.seed)
    chat = is_chat(loaded.tokenizer, options.raw)
    sampling = {"temperature": options.temperature, "top_p": options.top_p or 1.0, "stop": loaded.stop}
    for i, (prompt, one, limit) in enumerate(zip(prompts, ids, limits, strict=True)):
        streamed = not options.json and sys.stdout.isatty()
        if streamed:
            print("\n" * (i > 0) + _dim(visible(prompt)), end="\n" if chat else "", flush=True)
        try:
            answers = complete(
                loaded.model,
                loaded.tokenizer,
                [one],
                max_new_tokens=limit,
                on_text=_write if streamed else None,
                **sampling,
            )
        except KeyboardInterrupt:
            print()  # ends the line of the unfinished completion
            raise
        if options.json:
            print(json.dumps({"prompt": prompt, "completion": answers[0]}, ensure_ascii=False), flush=True)
        elif streamed:
            print("" if answers[0] else _dim("(nothing)"))
        else:
            print(answers[0], flush=True)
    return 0


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
    from oumi_pl.models.build import read_adapter_config

    if adapter.is_file() and (base := read_adapter_config(Path(path)).get("base_model_name_or_path")):
        locate(base, f"--model: the base of the adapter {name}")
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
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"--model: {name} lacks {len(missing)} of the model's weights, first {missing[0]}")
    return Loaded(model, tokenizer, [])


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
    module, data, _, _ = built(checkpoint, trust=trust)
    if not module.generates:
        raise UserError(f"--checkpoint: {checkpoint} is of {type(module).__name__}, which does not complete prompts")
    return Loaded(module.causal_lm.hf, data.tokenizer, data.stop_tokens)


def is_chat(tokenizer: Any, raw: bool) -> bool:
    """Whether prompts are sent as turns of a user."""
    return bool(tokenizer.chat_template) and not raw


def prompt_ids(tokenizer: Any, prompt: str, system: str | None = None, raw: bool = False) -> list[int]:
    """The ids of a prompt: a user's turn if the tokenizer has a chat template, else plain text.

    Raises:
        UserError: the template refuses the prompt, or `system` is given without a template.
    """
    if not is_chat(tokenizer, raw):
        if system is not None:
            raise UserError("--system: this tokenizer has no chat template, so there is no place for a system turn")
        return list(tokenizer(prompt)["input_ids"])
    from jinja2 import TemplateError

    from oumi_pl.data.template import adds_bos

    turns = [{"role": "system", "content": system}] if system is not None else []
    turns.append({"role": "user", "content": prompt})
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise UserError(f"the chat template refuses this prompt: {error}; leave the template out with --raw") from error
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
    parser.add_argument("--model", metavar="DIR", help="a model or LoRA adapter: a folder, or a name on the hub")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="a .ckpt file, or a run folder: its best",
    )
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be repeated")
    parser.add_argument("--file", metavar="FILE", help="a file with one prompt per line; - reads standard input")
    parser.add_argument("--system", metavar="TEXT", help="a system turn before the prompt")
    parser.add_argument("--raw", action="store_true", help="send the prompt as plain text, without the chat template")
    parser.add_argument("--max_new_tokens", type=int, metavar="N", help=f"longest completion (default: {LONGEST})")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (the default) is greedy")
    parser.add_argument(
        "--top_p",
        type=float,
        metavar="P",
        help="sample from the likeliest tokens that add up to P",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="seed of sampling")
    parser.add_argument("--json", action="store_true", help="print a line of JSON per prompt")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with a model")
    parser.add_argument("--trust", action="store_true", help=TRUST)
    parser.add_argument("--architecture", metavar="CLASS", help="class path of a model of your own, of --model")
    options = parser.parse_args(args)
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
    if options.raw and options.system is not None:
        raise UserError("--system needs the chat template, which --raw leaves out")
    return options


def _prompts(options: argparse.Namespace) -> list[str]:
    prompts = list(options.prompt)
    if any(not prompt.strip() for prompt in prompts):
        raise UserError("--prompt is empty")
    if options.file is not None:
        try:
            text = sys.stdin.read() if options.file == "-" else Path(options.file).expanduser().read_text("utf-8")
        except OSError as error:
            raise UserError(f"--file: {options.file} can't be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"--file: {options.file} is not UTF-8 text") from error
        prompts += [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UserError("generate: name a --prompt TEXT, or a --file with one per line (- for the standard input)")
    return prompts


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


def _limit(model: Any, prompt: int, asked: int | None) -> int:
    """Most tokens of a completion: the requested number, limited by the model's positions.

    Raises:
        UserError: the prompt alone needs more positions.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return asked or LONGEST
    if prompt >= positions:
        raise UserError(f"--prompt: it has {prompt:,} tokens, but the model has only {positions:,} positions")
    if asked is not None and asked > positions - prompt:
        left = f"the prompt leaves {positions - prompt:,} of the model's {positions:,} positions"
        print(f"note: {left}, so completions end there", file=sys.stderr)
    return min(asked or LONGEST, positions - prompt)
