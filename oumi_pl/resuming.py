"""`--resume`: which run goes on, from which checkpoint, with which arguments."""

from pathlib import Path

from oumi_pl import runs
from oumi_pl.errors import UserError, nearest


def arguments(command: str, resume: str, recipe: str, args: list[str]) -> tuple[Path, str, list[str]]:
    """The run folder, its recipe's name, and the command line that continues it.

    The run's own `config.yaml` takes the place of `--config`, for it is the record of what was running; what is typed
    beside it wins.

    Raises:
        UserError: if there is nothing to resume, or it is finished.
    """
    if command != "fit":
        raise UserError(f"--resume goes with fit; for {command}, name the weights: --ckpt_path FILE")
    typed = _without_config(args)
    run = runs.last_unfinished(_runs_dir(args), recipe) if not resume else _given(Path(resume).expanduser())
    state = runs.read_state(run)
    config = run / runs.CONFIG
    if not config.is_file():
        raise UserError(f"--resume: {run} has no {runs.CONFIG}, so it was stopped before it began; start it anew")
    arguments = ["--config", str(config), *typed]
    checkpoint = runs.newest_checkpoint(run)
    if checkpoint is not None:
        arguments.append(f"--ckpt_path={checkpoint}")
    print(f"resuming {run} from {checkpoint.name if checkpoint else 'the start: it has no checkpoint yet'}")
    return run, str(state.get("recipe", recipe)), arguments


def _given(path: Path) -> Path:
    if (path / runs.RUN).is_file():
        return path
    if path.is_dir():
        raise UserError(f"--resume: {path} is not a run folder (it has no {runs.RUN})")
    beside = [p.as_posix() for p in path.parent.glob("*") if p.is_dir()] if path.parent.is_dir() else []
    raise UserError(f"--resume: no run folder {path}{nearest(path.as_posix(), beside) if beside else ''}")


def _without_config(args: list[str]) -> list[str]:
    out: list[str] = []
    skip = False
    for arg in args:
        if skip:
            skip = False
        elif arg == "--config":
            skip = True
        else:
            out.append(arg)
    return out


def _runs_dir(args: list[str]) -> Path:
    for i, arg in enumerate(args):
        flag, equals, value = arg.partition("=")
        if flag == "--runs_dir":
            return Path(value if equals else args[i + 1]).expanduser()
    return Path("runs")
