"""oumi_pl: Oumi's trainers, rebuilt on PyTorch Lightning."""

__version__ = "0.1.0"
