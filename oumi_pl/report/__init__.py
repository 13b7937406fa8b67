"""Reports of runs: curves, one page, the list of runs, and runs side by side.

Everything is read from the files of a run folder, so a run that was killed or is still running can be looked at like a
finished one. Nothing here imports torch; matplotlib and numpy are imported where something is drawn.
"""
