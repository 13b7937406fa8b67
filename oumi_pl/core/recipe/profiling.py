"""Oumi's section `training.profiler`: PyTorch's profiler around the updates, with Oumi's files."""

from pathlib import Path
from typing import Any

import lightning as L
import torch

from oumi_pl.callbacks.run_folder import run_directory
from oumi_pl.core.configs import ProfilerParams

TABLES = ("time_total", "memory_usage")


class TorchProfile(L.Callback):
    """Records the updates of a run, and writes tables of operations and a trace for Perfetto.

    Files are `prof_RANK_local_LOCALRANK_cpu_time_total.txt` and the like, and `..._pt_trace.json.gz`.

    Args:
        directory: Folder of the files; `profiler` in the run's folder when left out.
        cpu: Whether operations on the CPU are recorded.
        cuda: Whether those on the GPU are, if there is one.
        record_shapes: Whether shapes of inputs are recorded, with a table by shape.
        profile_memory: Whether memory is recorded, with tables of it.
        with_stack: Whether files and lines are recorded.
        with_flops: Whether FLOPs are estimated.
        with_modules: Whether names of modules are recorded.
        row_limit: Rows of a table; -1 for all.
        schedule: `skip_first`, `wait`, `warmup`, `active` and `repeat`, counted in updates; None for the whole run.
    """

    def __init__(
        self,
        directory: str | None = None,
        cpu: bool = True,
        cuda: bool = False,
        *,
        record_shapes: bool = False,
        profile_memory: bool = False,
        with_stack: bool = False,
        with_flops: bool = False,
        with_modules: bool = False,
        row_limit: int = 50,
        schedule: dict[str, int] | None = None,
    ) -> None:
        self.directory = directory
        self.cpu = cpu
        self.cuda = cuda
        self.recorded: dict[str, Any] = {
            "record_shapes": record_shapes,
            "profile_memory": profile_memory,
            "with_stack": with_stack,
            "with_flops": with_flops,
            "with_modules": with_modules,
        }
        self.row_limit = row_limit
        self.schedule = schedule
        self._profile: Any = None
        self._step = 0
        self._prefix = ""
        self._folder = Path()

    @property
    def _devices(self) -> list[str]:
        """Devices that are recorded, by the words of the tables."""
        return ["cpu"] * self.cpu + ["cuda"] * (self.cuda and torch.cuda.is_available())

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins to record."""
        activities = [getattr(torch.profiler.ProfilerActivity, name.upper()) for name in self._devices]
        if not activities:
            return
        self._prefix, self._step = f"prof_{trainer.global_rank:03}_local_{trainer.local_rank:02}", trainer.global_step
        run = run_directory(trainer) or Path(trainer.default_root_dir)
        self._folder = run / "profiler" if self.directory is None else Path(self.directory).expanduser()
        self._profile = torch.profiler.profile(
            activities=activities,
            schedule=None if self.schedule is None else torch.profiler.schedule(**self.schedule),
            on_trace_ready=self._write,
            **self.recorded,
        )
        self._profile.start()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Counts updates."""
        if self._profile is not None and self.schedule is not None and trainer.global_step > self._step:
            self._step = trainer.global_step
            self._profile.step()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops to record, and writes what is not written yet."""
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stops to record."""
        self._stop()

    def _stop(self) -> None:
        profile, self._profile = self._profile, None
        if profile is not None:
            profile.stop()

    def _write(self, profile: Any) -> None:
        folder = self._folder
        folder.mkdir(parents=True, exist_ok=True)
        kinds = TABLES[: 1 + self.recorded["profile_memory"]]
        for by_shape in (False, True)[: 1 + self.recorded["record_shapes"]]:
            averages = profile.key_averages(group_by_input_shape=by_shape)
            for name in [f"{device}_{kind}" for device in self._devices for kind in kinds]:
                for key in (name, f"self_{name}"):
                    table = averages.table(sort_by=key, row_limit=self.row_limit)
                    file = folder / f"{self._prefix}_{key}{'_by_shape' * by_shape}.txt"
                    file.write_text(table, encoding="utf-8")
        profile.export_chrome_trace(str(folder / f"{self._prefix}_pt_trace.json.gz"))


def profile_arguments(params: ProfilerParams) -> dict[str, Any] | None:
    """Arguments of `TorchProfile`, as far as they aren't the defaults; None if nothing is profiled."""
    if not (params.enable_cpu_profiling or params.enable_cuda_profiling):
        return None
    arguments: dict[str, Any] = {"directory": params.save_dir} if params.save_dir else {}
    arguments |= {"cpu": False} if not params.enable_cpu_profiling else {}
    arguments |= {"cuda": True} if params.enable_cuda_profiling else {}
    for name in ("record_shapes", "profile_memory", "with_stack", "with_flops", "with_modules"):
        arguments |= {name: True} if getattr(params, name) else {}
    arguments |= {"row_limit": params.row_limit} if params.row_limit != 50 else {}
    if (schedule := params.schedule).enable_schedule:
        names = ("skip_first", "wait", "warmup", "active", "repeat")
        arguments["schedule"] = {name: getattr(schedule, name) for name in names}
    return arguments
