"""Describes the environment of a run: machine, packages, git commit."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "lightning", "transformers", "peft", "trl", "datasets", "bitsandbytes")


def environment() -> dict[str, Any]:
    """Python, platform, processor, memory, package versions and git commit. Takes a few hundredths of a second."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "machine": platform.machine(),
        "cpu": _cpu(),
        "cpus": usable_cpus(),
        **_memory(),
        "packages": _versions(),
        **_git(Path.cwd()),
    }


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cpus() -> int:
    """Number of CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> dict[str, float]:
    try:
        return {"memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)}
    except (AttributeError, ValueError, OSError):  # not on Windows
        return {}


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _git(directory: Path) -> dict[str, Any]:
    """Commit of the repository that contains a directory, and how many tracked files differ; empty without one."""
    git = shutil.which("git")
    if git is None:
        return {}
    command = [git, "--no-optional-locks", "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        done = subprocess.run(
            command, cwd=directory, capture_output=True, text=True, errors="replace", timeout=2, check=True
        )
    except (subprocess.SubprocessError, OSError):
        return {}
    lines = done.stdout.splitlines()
    commit = next((line.split()[-1] for line in lines if line.startswith("# branch.oid")), "(initial)")
    if commit == "(initial)":
        return {}
    return {"git": {"commit": commit, "changed_files": sum(not line.startswith("#") for line in lines)}}
