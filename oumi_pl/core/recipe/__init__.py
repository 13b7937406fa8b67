"""Oumi's training configs as native recipes."""

from oumi_pl.core.recipe.fields import FIELDS
from oumi_pl.core.recipe.recipe import Recipe, to_recipe
from oumi_pl.core.recipe.text import as_yaml
from oumi_pl.core.recipe.trainer import ENGINES, Engine

__all__ = ["ENGINES", "FIELDS", "Engine", "Recipe", "as_yaml", "to_recipe"]
