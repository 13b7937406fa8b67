"""What a model will see: examples as they are fed to it, packs, and the data report; in a terminal or as a page."""
