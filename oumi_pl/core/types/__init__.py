"""Oumi's types of conversations, which the user's own data sets return."""

from oumi_pl.core.types.conversation import ContentItem, Conversation, FinishReason, Message, Role, Type

__all__ = ["ContentItem", "Conversation", "FinishReason", "Message", "Role", "Type"]
