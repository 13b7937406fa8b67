"""Plans a run without its hardware: memory, communication and time of an update, computed on fake tensors."""
