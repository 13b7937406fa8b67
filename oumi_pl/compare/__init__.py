"""Trains a recipe on several engines, step by step, and reports the first difference."""
