"""Another engine for the same recipe: `transformers.Trainer` or TRL's trainers in place of Lightning's loop.

Model, data, order, optimizer, schedule, validation, run folder and export are those of the recipe; the engine runs its
own loop, its own forward pass and its own loss on them. `refusals` says what can't be the same and is therefore not
begun, `settings` and `losses` translate a recipe into the engine's arguments, `batches` our micro-batches into its
layout. `driven` holds what stock trainers are told to do otherwise, `course` what happens between two updates, and
`fitting` puts it all together.
"""

from oumi_pl.adapters.fitting import run

__all__ = ["run"]
