"""Reports of runs: curves, one page per run, the list of runs, and comparisons.

Everything is read from the files of a run folder, so a killed or running run has a report like a finished one. Nothing
here imports torch; matplotlib is imported where something is drawn.
"""
