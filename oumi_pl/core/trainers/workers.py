"""How many processes read rows."""

import os


def workers(number: int | str) -> int:
    """The number itself, or for `auto` one that suits the processes on this machine and its cores."""
    if number != "auto":
        return int(number)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(2 * local, 8, (os.cpu_count() or 1) // 4))
