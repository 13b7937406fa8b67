"""Chat templates: loading them, the tokens that they need from a tokenizer, and the variables that they read."""

import importlib.util
import re
from collections.abc import Mapping
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
        compiled(text).render(messages=[{"role": "user", "content": "?"}], add_generation_prompt=False)
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
        rendered = compiled(text).render(messages=turns, add_generation_prompt=False, **tokenizer.special_tokens_map)
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


def compiled(source: str) -> Any:
    """A chat template, compiled as transformers does, with its markers, filters and sandbox."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(source)


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
