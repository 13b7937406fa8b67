"""Shows what the model will see: examples, packs and the data report, in a terminal or as a page."""
