"""Configs of other libraries as recipes: axolotl, LLaMA-Factory and TRL. Oumi's are in `oumi_pl.core.recipe`."""
