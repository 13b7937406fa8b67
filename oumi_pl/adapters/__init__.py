"""Trains a recipe in the training loop of `transformers.Trainer` or of TRL's trainers, the "engines".

Model, data, row order, optimizer, schedule, validation, run folder and export come from the recipe. Loop, forward pass
and loss are the engine's. Settings that an engine does not support are refused before training.

| file | what it does |
|---|---|
| `train` | runs a recipe on an engine, from the objects that LightningCLI built |
| `trainers` | subclasses of the engines' trainers for our batches, and their arguments |
| `run_callback` | metrics, validation, checkpoints and stops between two updates |
| `batches` | converts micro-batches to the layout that an engine reads |
| `losses` | translates the recipe's loss into the engine's terms |
| `refusals` | refuses what an engine does not support |
| `checkpoints` | finds an engine's checkpoints, and adds to them what a resume needs |
"""

from oumi_pl.adapters.train import run

__all__ = ["run"]
