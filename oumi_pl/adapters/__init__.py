"""Trains a recipe in another loop: that of `transformers.Trainer`, or of TRL's trainers.

Model, data, order, optimizer, schedule, validation, run folder and export are those of the recipe. The loop, the
forward pass and the loss are the engine's. What an engine can't do as the recipe says is refused before training.

| file | what it does |
|---|---|
| `train` | runs a recipe on an engine, from the objects that LightningCLI made |
| `trainers` | the engines' trainers, and what they do differently on our batches |
| `run_callback` | metrics, validation, checkpoints and stops between two updates |
| `batches` | converts micro-batches to the layout that an engine reads |
| `losses`, `settings` | translate the recipe's loss and settings into the engine's arguments |
| `refusals` | what an engine can't do |
| `checkpoints` | finds an engine's checkpoints, and adds what a resume needs to them |
"""

from oumi_pl.adapters.train import run

__all__ = ["run"]
