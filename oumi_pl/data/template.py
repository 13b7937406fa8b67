"""Chat templates: loading them, the tokens that they need from a tokenizer, and the variables that they read."""

import contextlib
import importlib.util
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oumi_pl.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILT_IN = ("chatml", "llama3", "plain")
OUMI = tuple(
    f"oumi/{name}" for name in ("chat_ml", "default", "gemma2-it", "gpt2", "llama3-instruct", "phi3-instruct", "zephyr")
)
"""Templates that Oumi's recipes name. They add no tokens: those that a tokenizer lacks are tokenized as text."""
_OWN = "the tokenizer's own"
HELP = f"a built-in template ({', '.join(BUILT_IN)})"
TRL = "trl/"
"""Prefix of the names of templates that come with TRL."""
DATE = "date"
"""The template variable that sets the day which templates get as today."""

_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_CONTROL_TOKEN = re.compile(r"<\|[^|<>\s'\"]+\|>")


_BUILT_IN_VARIABLES = {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"}
_BUILT_IN_VARIABLES |= {"unk_token", "pad_token", "sep_token", "cls_token", "mask_token", "additional_special_tokens"}
_BUILT_IN_VARIABLES |= {"raise_exception", "strftime_now", "namespace", "dict", "range", "lipsum", "cycler", "joiner"}


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and what it needs from a tokenizer.

    text: the Jinja source. source: its origin, for messages: "the tokenizer's own", "built-in chatml", "file x.jinja".
    missing_tokens: special tokens that it writes and the tokenizer lacks. end_of_turn: the token that ends the
    assistant's turns, at which generation has to stop; None if that is the tokenizer's EOS.
    """

    text: str
    source: str
    missing_tokens: tuple[str, ...] = ()
    end_of_turn: str | None = None


def load_template(tokenizer: "PreTrainedTokenizerBase", template: str | None) -> ChatTemplate | None:
    """Finds the chat template to use, without changing the tokenizer.

    Args:
        tokenizer: The tokenizer that will be used.
        template: Name of a built-in template, `trl/NAME` for TRL's training template of a model, the name of one of the
            tokenizer's own templates if it has several, the path of a `.jinja` file, or None for the tokenizer's own.

    Returns:
        The template; None if none is named and the tokenizer has none. Rows that are conversations are then refused by
        `ChatRenderer`.

    Raises:
        UserError: no such template (offers the nearest), it isn't valid Jinja, or it needs an EOS token that the
            tokenizer doesn't have.
    """
    if template is None and not tokenizer.chat_template:
        return None
    text, source = _read(tokenizer, template)
    _check(tokenizer, text, source)
    # Only other templates than the tokenizer's own add tokens: it has those that its own needs.
    written = set() if source == _OWN or template in OUMI else set(_CONTROL_TOKEN.findall(_COMMENT.sub("", text)))
    missing = tuple(token for token in sorted(written) if not _is_token(tokenizer, token))
    return ChatTemplate(text, source, missing, _end_of_turn(tokenizer, text, missing))


def apply_template(tokenizer: "PreTrainedTokenizerBase", chat_template: ChatTemplate | None) -> list[int]:
    """Sets a tokenizer's template, adds the special tokens it lacks, and sets a pad token.

    Without a pad token, EOS becomes the pad token, which is harmless because masks never depend on ids.

    Returns:
        The ids added to the vocabulary, for which a model needs new embeddings. Tokens that were in the vocabulary and
        only became special are not among them, since they have trained rows.

    Raises:
        UserError: the tokenizer has neither pad nor EOS token.
    """
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError("the tokenizer has neither a pad token nor an end-of-text token (eos_token); set one")
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template is None:
        return []
    if chat_template.source != _OWN:
        tokenizer.chat_template = chat_template.text
    before = set(tokenizer.get_vocab().values())
    tokenizer.add_tokens(list(chat_template.missing_tokens), special_tokens=True)
    return sorted(set(tokenizer.get_vocab().values()) - before)


def _read(tokenizer: "PreTrainedTokenizerBase", template: str | None) -> tuple[str, str]:
    """Text and source of a template."""
    own: Any = tokenizer.chat_template
    if template is None:
        return own if isinstance(own, str) else str(own.get("default") or next(iter(own.values()))), _OWN
    if isinstance(own, dict) and template in own:
        return str(own[template]), f"{_OWN} {template}"
    if template.startswith(TRL):
        return _read_trl(template.removeprefix(TRL)), template
    if template in BUILT_IN or template in OUMI:
        text = (Path(__file__).parent / "templates" / f"{template}.jinja").read_text("utf-8")
        if template in OUMI:
            return text, template
        # If the tokenizer begins every text with BOS, the template does so too, also after an export.
        if "bos_token" not in text and adds_bos(tokenizer):
            text = "{{- bos_token }}" + text
        return text, f"built-in {template}"
    path = Path(template).expanduser()
    if path.is_file():
        return path.read_text("utf-8"), f"file {path.name}"
    if path.exists() and path.suffix == ".jinja":
        raise UserError(f"data.template: {template} is not a file")
    if path.suffix != ".jinja":
        raise UserError(
            f"data.template: unknown chat template {template!r}{nearest(template, (*BUILT_IN, *OUMI))} (or name a "
            ".jinja file)"
        )
    beside = [str(file) for file in path.parent.glob("*.jinja")]
    raise UserError(f"data.template: no chat template file {template!r}{nearest(template, [*beside, *BUILT_IN])}")


def _read_trl(name: str) -> str:
    """The training template that TRL has for a model, or the model's own if it needs no other."""
    spec = importlib.util.find_spec("trl")  # not imported, which would take seconds
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"data.template: {TRL}{name} comes with TRL, which isn't installed: pip install 'oumi_pl[trl]', or choose "
            f"{HELP}"
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "chat_templates"
    for file in (folder / f"{name}_training.jinja", folder / f"{name}.jinja"):
        if file.is_file():
            return file.read_text("utf-8")
    known = sorted({file.stem.removesuffix("_training") for file in folder.glob("*.jinja")})
    raise UserError(f"data.template: TRL has no template {name!r}{nearest(name, known)}; it has {', '.join(known)}")


def _check(tokenizer: "PreTrainedTokenizerBase", text: str, source: str) -> None:
    import jinja2

    try:
        with limits(text):
            compiled(text).render(messages=[{"role": "user", "content": "?"}], add_generation_prompt=False)
    except TemplateLimitError as error:
        raise UserError(f"data.template: {source}: {error}") from error
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"data.template: chat template ({source}) isn't valid Jinja, line {error.lineno}: {error.message}"
        ) from error
    except Exception:  # it may need other turns, or a tool: then rows decide
        pass
    if "eos_token" in text and tokenizer.eos_token is None and source.startswith("built-in"):
        raise UserError(f"chat template ({source}) ends turns with the tokenizer's eos_token, and it has none: set one")


def adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer itself begins every text with its BOS token."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("x")["input_ids"][:1]) == [bos]


def _is_token(tokenizer: "PreTrainedTokenizerBase", token: str) -> bool:
    """Whether a string is a single token of the vocabulary."""
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    return len(ids) == 1 and (ids[0] != tokenizer.unk_token_id or token == tokenizer.unk_token)


def _end_of_turn(tokenizer: "PreTrainedTokenizerBase", text: str, missing: tuple[str, ...]) -> str | None:
    """The special token after an answer, found by rendering one; None if it is EOS or there is none."""
    probe = "Seventeen."
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": probe}]
    try:
        with limits(text):
            rendered = compiled(text).render(
                messages=turns, add_generation_prompt=False, **tokenizer.special_tokens_map
            )
    except Exception:  # the template refuses these turns
        return None
    _, found, tail = rendered.rpartition(probe)
    if not found:
        return None
    ends = [token for token in (*special_tokens(tokenizer), *missing) if tail.lstrip().startswith(token)]
    end = max(ends, key=len, default=None)
    return None if end == tokenizer.eos_token else end


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, ...]:
    """The texts of a tokenizer's special tokens."""
    return tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)


# ---- Jinja


class TemplateLimitError(UserError):
    """A chat template takes too long, or writes too much."""


SECONDS = 10.0
"""Seconds after which the rendering of a template is ended: a template may loop for ever."""
CHARACTERS = 100_000_000
"""Most characters of a text that a template puts together."""
_limited: set[str] = set()
"""Templates that took too long in this process; they are not rendered again for the next row."""


@lru_cache(maxsize=256)
def compiled(source: str) -> Any:
    """A chat template, compiled as transformers does, with its markers, filters and sandbox; its texts are limited.

    Call it within `limits`.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment: Any = _compile_jinja_template("").environment  # not of the source, which would be compiled unlimited
    environment.optimized = False  # else constants are computed while it is compiled
    environment.intercepted_binops = frozenset(OPERATORS)
    environment.binop_table = environment.binop_table | OPERATORS
    environment.filters |= {"center": _centered, "format": _formatted}
    template = environment.from_string(source)
    names = template.root_render_func.__globals__
    join = names["str_join"]

    def limited_join(parts: Any) -> Any:
        kept, size = [], 0
        for part in parts:
            size += len(part) if isinstance(part, str) else 0
            _refuse_long(size)
            kept.append(part)
        return join(kept)

    names["str_join"] = limited_join
    environment.concat = limited_join  # of all that the template writes
    return template


@contextlib.contextmanager
def limits(source: str) -> Iterator[None]:
    """Ends the rendering of a template after `SECONDS` of work, in the main thread of a process.

    Raises:
        TemplateLimitError: it took longer, now or before.
    """
    too_long = f"the chat template takes more than {SECONDS:.0f} s for a conversation; does it loop for ever?"
    if source in _limited:
        raise TemplateLimitError(too_long)
    is_main = threading.current_thread() is threading.main_thread()
    if (
        not _may_be_long(source)
        or not is_main
        or not hasattr(signal, "setitimer")
        or signal.getitimer(signal.ITIMER_REAL)[0]
    ):
        yield
        return

    is_rendering = True
    started = time.thread_time()  # of this thread's own work: other programs, or a laptop that slept, do not count

    def end(*_: Any) -> None:
        if not is_rendering:  # an exception as deep as the stack allows kept the timer from being stopped
            return
        if (left := SECONDS - (time.thread_time() - started)) > 0:
            signal.setitimer(signal.ITIMER_REAL, max(left, 0.1))
            return
        _limited.add(source)
        raise TemplateLimitError(too_long)

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        is_rendering = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@lru_cache(maxsize=256)
def _may_be_long(source: str) -> bool:
    """Whether a template can take long: starting and ending a timer would take half the time of rendering most."""
    depth = deepest = 0
    for word in re.findall(r"\{%[-+]?\s*(for|endfor)\b", source):
        depth += 1 if word == "for" else -1
        deepest = max(deepest, depth)
    return deepest > 2 or re.search(r"range|macro|recursive|lipsum", source) is not None


def _refuse_long(characters: int) -> None:
    if characters > CHARACTERS:
        raise TemplateLimitError(f"the chat template puts together a text of {characters:,} characters")


def _added(left: Any, right: Any) -> Any:
    if isinstance(left, str | list) and isinstance(right, str | list):
        _refuse_long(len(left) + len(right))
    return left + right


def _times(left: Any, right: Any) -> Any:
    for text, number in ((left, right), (right, left)):
        if isinstance(text, str | list | tuple) and isinstance(number, int):
            _refuse_long(len(text) * number)
    return left * right


def _percent(left: Any, right: Any) -> Any:
    if isinstance(left, str):
        widths = [int(width[:12]) for width in re.findall(r"\d+", left)]
        if "*" in left and isinstance(right, tuple):  # a width that is given as a value
            widths += [value for value in right if isinstance(value, int)]
        _refuse_long(max(widths, default=0))
    return left % right


def _power(left: Any, right: Any) -> Any:
    _refuse_long(int(abs(left) > 1) * int(abs(right)) * 16)
    return left**right


def _centered(text: Any, width: int = 80) -> str:
    _refuse_long(width)
    return str(text).center(width)


def _formatted(text: Any, *values: Any, **names: Any) -> str:
    return str(_percent(str(text), names or values))


OPERATORS = {"+": _added, "*": _times, "%": _percent, "**": _power}
"""Operators of templates with which a few characters can make a text or a number of gigabytes."""


@lru_cache(maxsize=256)
def variables_of(source: str) -> frozenset[str]:
    """Names that a template reads and that a recipe or a row may set."""
    from jinja2 import meta

    return frozenset(meta.find_undeclared_variables(compiled(source).environment.parse(source)) - _BUILT_IN_VARIABLES)


def check_variables(template: Any, names: Mapping[str, Any]) -> None:
    """Refuses variables that a template doesn't read.

    Args:
        template: A template, several by name, or None.
        names: The variables. `date` is known for templates that ask for today's date.

    Raises:
        UserError: names the first of them, and those that the template reads.
    """
    if not names:
        return
    texts = template.values() if isinstance(template, Mapping) else [template] if template else []
    known = {name for text in texts for name in variables_of(text)} | ({DATE} if writes_date(template) else set())
    for name in names:
        if name not in known:
            reads = f"it reads {', '.join(sorted(known))}" if known else "it reads none"
            raise UserError(f"template_variables: the chat template reads no {name!r}{nearest(name, known)}; {reads}")


def writes_date(template: Any) -> bool:
    """Whether a template, or one of several, asks for today's date."""
    texts = template.values() if isinstance(template, Mapping) else [template or ""]
    return any("strftime_now" in text for text in texts)
