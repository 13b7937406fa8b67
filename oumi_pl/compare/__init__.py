"""Trains the same recipe on several engines, step by step, and names the first difference."""
