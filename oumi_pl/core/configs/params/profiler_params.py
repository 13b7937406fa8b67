"""torch.profiler, and when it looks."""

from dataclasses import dataclass, field

from oumi_pl.core.configs.params.base_params import BaseParams


@dataclass
class ProfilerScheduleParams(BaseParams):
    """Which steps are recorded."""

    enable_schedule: bool = False
    """false: the whole run is recorded."""
    wait: int = 0
    """Steps of a cycle that are passed over."""
    warmup: int = 1
    """Steps that are traced and thrown away."""
    active: int = 3
    """Steps that are recorded."""
    repeat: int = 1
    """Number of cycles; 0: until the end."""
    skip_first: int = 1
    """Steps before the first cycle."""

    def _check(self) -> None:
        self._at_least(0, "wait", "warmup", "repeat", "skip_first")
        self._at_least(1, "active")


@dataclass
class ProfilerParams(BaseParams):
    """What is recorded; off unless one of the two `enable_` is true."""

    save_dir: str | None = None
    """Where profiles are written; null: `profiler` in the output directory."""
    enable_cpu_profiling: bool = False
    """Whether the CPU's time is recorded."""
    enable_cuda_profiling: bool = False
    """Whether the GPU's time is recorded."""
    record_shapes: bool = False
    """Whether operations are told apart by their shapes."""
    profile_memory: bool = False
    """Whether memory is recorded."""
    with_stack: bool = False
    """Whether lines of code are recorded."""
    with_flops: bool = False
    """Whether floating-point operations are estimated."""
    with_modules: bool = False
    """Whether operations are told apart by their modules."""
    row_limit: int = 50
    """Rows of a table; -1: all."""
    schedule: ProfilerScheduleParams = field(default_factory=ProfilerScheduleParams)
    """Which steps are recorded."""
