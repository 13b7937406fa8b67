"""What a run writes down of itself."""

from dataclasses import dataclass

from oumi_pl.core.configs.params.base_params import BaseParams


@dataclass
class TelemetryParams(BaseParams):
    """Timings, devices, and the configuration of a run."""

    telemetry_dir: str | None = "telemetry"
    """Where it is written, within the output directory unless absolute; null: nowhere."""
    collect_telemetry_for_all_ranks: bool = False
    """Whether all ranks are written down, not only the first."""
    track_gpu_temperature: bool = False
    """Whether the GPU's temperature is written down at each step."""
