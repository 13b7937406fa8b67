"""Oumi's base class of models, for the user's own."""

from oumi_pl.core.models.base_model import BaseModel

__all__ = ["BaseModel"]
