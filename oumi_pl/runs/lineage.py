"""Which run a run goes on from: by a checkpoint of it (`--ckpt_path`), or by the model that it exported."""

from pathlib import Path
from typing import Any

from oumi_pl.runs import folders


def parent_of(ckpt_path: str | Path | None, model: str | Path | None) -> dict[str, Any] | None:
    """Run, folder, checkpoint and step that a new run starts from; None if it is of no run.

    Args:
        ckpt_path: A checkpoint that training continues from.
        model: The model that a recipe starts from: a folder, or a name on the hub.
    """
    if ckpt_path is not None:
        checkpoint = Path(ckpt_path).expanduser().resolve()
        run = next((folder for folder in checkpoint.parents[:2] if (folder / folders.RUN).is_file()), None)
        step = folders.step_of(checkpoint)
        return _described(run, checkpoint.name, None if step < 0 else step)
    path = Path(model).expanduser().resolve() if model is not None else None
    if path is None or not path.is_dir() or not (path.parent / folders.RUN).is_file():
        return None
    state = folders.read_state(path.parent)
    return _described(path.parent, path.name, state.get("exported_step", state.get("step")))


def _described(run: Path | None, checkpoint: str, step: int | None) -> dict[str, Any]:
    name, folder = (None, None) if run is None else (run.name, str(run))
    return {"run": name, "folder": folder, "checkpoint": checkpoint, "step": step}


def parent_text(state: dict[str, Any]) -> str:
    """The parent in the state of a run, in words: `base, step 340 (step-00000340.ckpt)`; empty if there is none."""
    parent = state.get("parent")
    if not parent:
        return ""
    step = parent.get("step")
    where = f"step {step:,} ({parent.get('checkpoint')})" if isinstance(step, int) else str(parent.get("checkpoint"))
    return f"{parent['run']}, {where}" if parent.get("run") else where
