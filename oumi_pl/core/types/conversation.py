"""Conversations, messages and their parts, by Oumi's names and with its dictionaries and JSON."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from oumi_pl.errors import UserError, nearest


class Role(StrEnum):
    """Who says a message."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


class Type(StrEnum):
    """What a part of a message is."""

    TEXT = "text"
    IMAGE_PATH = "image_path"
    IMAGE_URL = "image_url"
    IMAGE_BINARY = "image_binary"


class FinishReason(StrEnum):
    """Why a model stopped."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    CONTENT_FILTER = "content_filter"
    ERROR = "error"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class ContentItem:
    """A part of a message: a text, or an image."""

    type: Type
    content: str | None = None
    binary: bytes | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "type", _member(Type, self.type, "type"))
        if self.content is None and self.binary is None:
            raise UserError(f"a {self.type} item has neither content nor binary")
        if self.is_text() and self.binary is not None:
            raise UserError("a text item has no binary; pass the text as content")

    def is_image(self) -> bool:
        """Whether it is an image."""
        return self.type is not Type.TEXT

    def is_text(self) -> bool:
        """Whether it is a text."""
        return self.type is Type.TEXT


@dataclass(frozen=True, kw_only=True)
class Message:
    """A turn of a conversation. `content` may be None beside `tool_calls`."""

    role: Role
    content: str | list[ContentItem] | None = None
    id: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "role", _member(Role, self.role, "role"))
        if isinstance(self.content, list):
            items = [one if isinstance(one, ContentItem) else ContentItem(**one) for one in self.content]
            object.__setattr__(self, "content", items)
        elif self.content is None and not self.tool_calls:
            raise UserError(f"a message of the {self.role} has neither content nor tool_calls")
        elif not isinstance(self.content, str | None):
            raise UserError(f"content is {type(self.content).__name__}; a message holds text, or a list of items")

    def get(self, key: str, default: Any = None) -> Any:
        """A field by its name, as templates ask for it."""
        return getattr(self, key) if key in self.__dataclass_fields__ else default

    @property
    def content_items(self) -> list[ContentItem]:
        """All parts; a text is one."""
        if isinstance(self.content, str):
            return [ContentItem(type=Type.TEXT, content=self.content)]
        return list(self.content or ())

    @property
    def text_content_items(self) -> list[ContentItem]:
        """The texts among the parts."""
        return [item for item in self.content_items if item.is_text()]

    @property
    def image_content_items(self) -> list[ContentItem]:
        """The images among the parts."""
        return [item for item in self.content_items if item.is_image()]

    def contains_images(self) -> bool:
        """Whether a part is an image."""
        return bool(self.image_content_items)

    def contains_text(self) -> bool:
        """Whether a part is a text."""
        return bool(self.text_content_items)

    def compute_flattened_text_content(self, separator: str = " ") -> str:
        """All texts, joined."""
        return separator.join(item.content or "" for item in self.text_content_items)

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set; `content: None` stays beside tool calls.

        Raises:
            UserError: an item holds bytes: images are not trained on.
        """
        values = {name: value for name in self.__dataclass_fields__ if (value := getattr(self, name)) is not None}
        values["role"] = str(self.role)
        if isinstance(self.content, list):
            if binary := next((item for item in self.content if item.binary is not None), None):
                raise UserError(f"a message of the {self.role} has an {binary.type} with binary; only text can be used")
            values["content"] = [{"type": str(item.type), "content": item.content} for item in self.content]
        if self.tool_calls:
            values.setdefault("content", None)
        return values


@dataclass
class Conversation:
    """Messages, and what is known of them. Dictionaries in `messages` become messages."""

    messages: list[Message]
    conversation_id: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    tools: list[Any] | None = None

    def __post_init__(self) -> None:
        self.messages = [one if isinstance(one, Message) else _message(one) for one in self.messages]
        if self.tools is not None:
            self.tools = [_tool(tool) for tool in self.tools]

    def __getitem__(self, idx: int) -> Message:
        return self.messages[idx]

    def __iter__(self) -> Iterator[Message]:
        return iter(self.messages)

    def filter_messages(
        self, *, role: Role | None = None, filter_fn: Callable[[Message], bool] | None = None
    ) -> list[Message]:
        """The messages of a role that fit a condition; all without either."""
        return [
            message
            for message in self.messages
            if role in (None, message.role) and (filter_fn is None or filter_fn(message))
        ]

    def first_message(self, role: Role | None = None) -> Message | None:
        """The first message, of a role; None if there is none."""
        return next(iter(self.filter_messages(role=role)), None)

    def last_message(self, role: Role | None = None) -> Message | None:
        """The last message, of a role; None if there is none."""
        return next(iter(reversed(self.filter_messages(role=role))), None)

    def append_id_to_string(self, s: str) -> str:
        """A text with the conversation's id behind it, if it has one."""
        if not self.conversation_id:
            return s
        return f"{s.strip()} Conversation id: {self.conversation_id}.".strip()

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set, as JSON can write them."""
        values: dict[str, Any] = {"messages": [message.to_dict() for message in self.messages]}
        for name in ("conversation_id", "metadata", "tools"):
            if value := getattr(self, name):
                values[name] = value
        return values

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Conversation":
        """A conversation from its dictionary."""
        known = {key: value for key, value in data.items() if key in cls.__dataclass_fields__}
        if "messages" not in known:
            raise UserError(f"a conversation needs 'messages', and has {', '.join(map(str, data)) or 'nothing'}")
        return cls(**known)

    def to_json(self) -> str:
        """The dictionary as JSON."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, data: str) -> "Conversation":
        """A conversation from its JSON."""
        return cls.from_dict(json.loads(data))


def _message(value: Any) -> Message:
    if not isinstance(value, Mapping):
        raise UserError(f"a message is {type(value).__name__}; it is a Message, or a dictionary with role and content")
    return Message(**{key: item for key, item in value.items() if key in Message.__dataclass_fields__})


def _tool(tool: Any) -> dict[str, Any]:
    """A tool as its schema; a function is described by its annotations and docstring."""
    if isinstance(tool, Mapping):
        return dict(tool)
    if callable(tool):
        from transformers.utils.chat_template_utils import get_json_schema

        return get_json_schema(tool)
    raise UserError(f"a tool is {type(tool).__name__}; it is a schema, or a function")


def _member(kind: type[StrEnum], value: Any, name: str) -> Any:
    if value not in list(kind):
        raise UserError(f"{name}: {value!r} is unknown{nearest(str(value), map(str, kind))}")
    return kind(value)
