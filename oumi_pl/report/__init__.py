"""What a run folder tells: curves, one page, the list of runs, and runs side by side.

All of it is made from the files of a run folder alone, so that a run that was killed, or goes on, can be looked at like
one that is finished. Nothing here imports torch; matplotlib and numpy are imported where something is drawn.
"""
