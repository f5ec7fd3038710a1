"""What a result must say about the machine, and what disturbed the measurement on it."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llava_edge import native
from llava_edge.bench.record import Kind, Machine, Metric, Recommendation, Result, Row

# Others may take this share of the machine before a result says so.
BUSY = 0.05
_POWER = Path("/sys/class/power_supply")
_RAPL = Path("/sys/class/powercap")


def result(
    kind: Kind,
    rows: tuple[Row, ...],
    settings: dict[str, Any],
    *,
    ceilings: dict[str, Metric] | None = None,
    warnings: tuple[str, ...] = (),
    recommendations: tuple[Recommendation, ...] = (),
) -> Result:
    """A record of this run on this machine, now."""
    return Result(
        kind=kind,
        created_utc=utc_now(),
        version=package_version("llava-edge"),
        llama_cpp_version=native.version(),
        llama_cpp_commit=llama_cpp_commit(),
        onnxruntime_version=package_version("onnxruntime"),
        machine=machine(),
        settings=json.loads(json.dumps(settings)),
        rows=rows,
        ceilings=ceilings or {},
        warnings=warnings,
        recommendations=recommendations,
    )


def decisive(found: Result) -> dict[str, Any]:
    """What all figures of one table must share: the programs and the processor. The power source may change."""
    names = ("version", "llama_cpp_version", "llama_cpp_commit", "onnxruntime_version")
    programs = {name: getattr(found, name) for name in names}
    return programs | {name: getattr(found.machine, name) for name in ("cpu", "architecture", "cpu_flags", "cores")}


def utc_now() -> str:
    """The time as records have it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def machine() -> Machine:
    """The machine that runs this."""
    flags: bytes = native.llama().llama_print_system_info()
    return Machine(
        cpu=_cpu_name(),
        architecture=platform.machine(),
        system=f"{platform.system()} {platform.release()}",
        cores=native.default_threads(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        cpu_flags=flags.decode("utf-8", "replace").strip(),
        power_source=power_source(),
        python=platform.python_version(),
    )


def llama_cpp_commit() -> str:
    """The revision that ggml was built from, as it says itself; empty if it doesn't know."""
    native.llama()
    from llama_cpp._ggml import libggml

    try:
        commit = libggml.ggml_commit
    except AttributeError:
        return ""
    commit.restype = ctypes.c_char_p
    return (commit() or b"").decode("utf-8", "replace")


def power_source() -> str:
    """``mains``, ``battery`` or ``unknown``."""
    if sys.platform == "darwin":
        said = subprocess.run(["/usr/bin/pmset", "-g", "batt"], capture_output=True, text=True, check=False).stdout
        return "battery" if "Battery Power" in said else "mains" if "AC Power" in said else "unknown"
    try:
        kinds = {path.name: (path / "type").read_text().strip() for path in _POWER.iterdir()}
        if any(kind == "Mains" and (_POWER / n / "online").read_text().strip() == "1" for n, kind in kinds.items()):
            return "mains"
        states = [(_POWER / n / "status").read_text().strip() for n, kind in kinds.items() if kind == "Battery"]
    except OSError:
        return "unknown"
    return "battery" if "Discharging" in states else "mains" if states else "unknown"


def energy_joules() -> float | None:
    """Energy of the processor packages since some time ago, where the system lets this user read it (Intel's RAPL).

    Another zone at the top, ``psys``, is the whole laptop and has the packages in it.
    """
    try:
        found = sorted(_RAPL.glob("intel-rapl:[0-9]*"))
        zones = [zone for zone in found if (zone / "name").read_text().startswith("package")]
        total = sum(int((zone / "energy_uj").read_text()) for zone in zones)
    except (OSError, ValueError):
        return None
    return total / 1e6 if zones else None


class Watch:
    """Tells how much of the processor others used since it was made."""

    def __init__(self) -> None:
        self._start = self._now()

    def others(self) -> float | None:
        """Share of the whole machine, 0 to 1; None where the system doesn't say. The hypervisor's theft counts."""
        now = self._now()
        if now is None or self._start is None:
            return None
        busy, own, total = (after - before for after, before in zip(now, self._start, strict=True))
        return max(0.0, min(1.0, (busy - own) / total)) if total > 0 else None

    def _now(self) -> tuple[float, float, float] | None:
        """Seconds of all processors that were busy, that this process and its children used, and that passed."""
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return None
        ticks = [int(field) / os.sysconf("SC_CLK_TCK") for field in fields]
        idle = ticks[3] + ticks[4]
        own = os.times()
        return sum(ticks) - idle, own.user + own.system + own.children_user + own.children_system, sum(ticks)


def _cpu_name() -> str:
    if sys.platform == "darwin":
        key = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(key, capture_output=True, text=True, check=False).stdout.strip()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def package_version(name: str) -> str:
    """Of an installed package, ``unknown`` without one."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
