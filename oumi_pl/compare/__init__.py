"""The same recipe on several engines, step by step: what differs first, if anything does."""
