"""Talk with a model in the terminal. /clear starts over, /exit or the end of input ends, Ctrl-C stops an answer."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from oumi_pl.commands.export import TRUST
from oumi_pl.commands.generate import Loaded, from_checkpoint, from_folder, record_ids
from oumi_pl.commands.parser import Parser
from oumi_pl.errors import UserError
from oumi_pl.terminal.screen import has_colours, meanwhile
from oumi_pl.terminal.text import echo, visible
from oumi_pl.types import Conversation, Message

CLEAR, EXIT = "/clear", ("/exit", "/quit")


def main(args: list[str]) -> int:
    """Runs the command; returns its exit code."""
    options = _options(args)
    with meanwhile("loading the model"):
        loaded = _loaded(options)
    if not loaded.tokenizer.chat_template:
        raise UserError("chat: this tokenizer has no chat template; complete texts with `oumi_pl generate`")
    import torch

    loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
    if options.seed is not None:
        torch.manual_seed(options.seed)
    if sys.stdin.isatty():
        echo("/clear starts over, /exit ends, Ctrl-C stops an answer", file=sys.stderr)
    conversation = Chat(loaded, options)
    for line in _lines():
        if line in EXIT:
            break
        if line == CLEAR:
            conversation.clear()
        elif line.startswith("/"):
            echo(f"unknown {line}; there are {CLEAR} and {EXIT[0]}", file=sys.stderr)
        elif line:
            conversation.ask(line)
    return 0


class Chat:
    """A conversation with a model, whose answers are printed as they are generated.

    Args:
        loaded: Model and tokenizer.
        options: Of the command line.
    """

    def __init__(self, loaded: Loaded, options: argparse.Namespace) -> None:
        self.loaded = loaded
        self.options = options
        self.turns: tuple[Message, ...] = ()

    def clear(self) -> None:
        """Forgets all turns but the system prompt."""
        self.turns = ()

    def ask(self, text: str) -> str:
        """Prints and returns the answer to a turn of the user; what Ctrl-C cuts off is remembered as far as it went.

        An answer that can't be given, since the conversation is too long, is not remembered, nor is its question.
        """
        turns = (*self.turns, Message(role="user", content=text))
        ids = record_ids(self.loaded.tokenizer, Conversation(turns, prompt_messages=len(turns)), self.options.system)
        room = self._context() - len(ids)
        if room < 1:
            echo(f"the conversation is longer than the model's {self._context()} tokens: {CLEAR}", file=sys.stderr)
            return ""
        answer = self._answer(ids, min(room, self.options.max_new_tokens))
        self.turns = (*turns, Message(role="assistant", content=answer))
        return answer

    def _answer(self, ids: list[int], longest: int) -> str:
        from oumi_pl.models.generation import complete

        pieces: list[str] = []

        def show(piece: str) -> None:
            pieces.append(piece)
            print(visible(piece), end="", flush=True)

        with contextlib.suppress(KeyboardInterrupt):
            complete(
                self.loaded.model,
                self.loaded.tokenizer,
                [ids],
                max_new_tokens=longest,
                stop=self.loaded.stop,
                temperature=self.options.temperature,
                top_p=self.options.top_p,
                on_text=show,
            )
        print(flush=True)
        return "".join(pieces)

    def _context(self) -> int:
        """Tokens that the model reads at most."""
        config = self.loaded.model.config
        known = getattr(config.get_text_config(), "max_position_embeddings", None)
        return int(known) if known else sys.maxsize


def _lines() -> Iterator[str]:
    """The lines of standard input, without white space around them; on a terminal, with a prompt for each."""
    if not sys.stdin.isatty():
        try:
            yield from map(_checked, sys.stdin)
        except UnicodeDecodeError as error:
            raise UserError("chat: the input is not UTF-8") from error
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - `input` then has a history and arrow keys
    sign = "\001\033[1m\002> \001\033[0m\002" if has_colours(sys.stdout) else "> "
    while True:
        try:
            line = input(sign)
        except (EOFError, KeyboardInterrupt):
            print()
            return
        yield _checked(line)


def _checked(line: str) -> str:
    """A line without white space around it.

    Raises:
        UserError: it is not UTF-8, so that it has no text.
    """
    try:
        line.encode()  # bytes that are no UTF-8 are read as surrogates
    except UnicodeEncodeError as error:
        raise UserError("chat: the input is not UTF-8") from error
    return line.strip()


def _loaded(options: argparse.Namespace) -> Loaded:
    if options.model:
        return from_folder(options.model, options.trust_remote_code)
    if options.checkpoint:
        return from_checkpoint(options.checkpoint.expanduser(), trust=options.trust)
    from oumi_pl.runs import folders

    run = folders.find(options.run, options.runs_dir.expanduser())
    if (run / "model").is_dir():
        return from_folder(str(run / "model"), options.trust_remote_code)
    return from_checkpoint(run, trust=options.trust)


def _options(args: list[str]) -> argparse.Namespace:
    """Parses the command line.

    Raises:
        UserError: no model is named, or several are; a number is out of range.
    """
    parser = Parser("chat", __doc__)
    parser.add_argument("--model", metavar="DIR", help="a model or LoRA adapter: a folder, or a name on the hub")
    parser.add_argument("--run", metavar="NAME", help="the model of a run: the exported one, else its best checkpoint")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="a .ckpt file, or a run folder: its best")
    parser.add_argument("--runs_dir", type=Path, default=Path("runs"), help="folder of the runs (default: runs)")
    parser.add_argument("--system", metavar="TEXT", help="a system prompt")
    parser.add_argument("--max_new_tokens", type=int, default=512, metavar="N", help="longest answer (default: 512)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    parser.add_argument("--top_p", type=float, default=1.0, metavar="P", help="sample from the likeliest tokens alone")
    parser.add_argument("--seed", type=int, metavar="N", help="of sampling")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with a model")
    parser.add_argument("--trust", action="store_true", help=TRUST)
    options = parser.parse_args(args)
    if sum(bool(value) for value in (options.model, options.run, options.checkpoint)) != 1:
        raise UserError("chat: name one model: --model DIR, --run NAME or --checkpoint FILE")
    if options.max_new_tokens < 1 or options.temperature < 0 or not 0 < options.top_p <= 1:
        raise UserError("chat: --max_new_tokens is at least 1, --temperature at least 0, --top_p above 0 and at most 1")
    return options
