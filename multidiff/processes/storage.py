"""Forward processes as plain settings, for files, which can name those of multidiff and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from multidiff.processes.absorbing import Absorbing
from multidiff.processes.hybrid import Hybrid
from multidiff.processes.process import Process
from multidiff.processes.schedules import Cosine, CosineSquared, Geometric, LogLinear, Polynomial, Schedule
from multidiff.processes.uniform import Uniform

_PROCESSES = {"absorbing": Absorbing, "uniform": Uniform, "hybrid": Hybrid}
_SCHEDULES = {
    "log_linear": LogLinear,
    "cosine": Cosine,
    "cosine_squared": CosineSquared,
    "polynomial": Polynomial,
    "geometric": Geometric,
}
_NAMES = {kind: name for name, kind in (_PROCESSES | _SCHEDULES).items()}


def to_settings(process: Process) -> dict[str, Any]:
    """The settings of a process, from which `from_settings` restores it.

    A schedule of one's own is left out where the noise is absorbing: neither sampling nor the bound depends on it.

    Raises:
        ValueError: a process, or another schedule, of one's own.
    """
    if type(process) is Absorbing and type(process.schedule) not in _NAMES:
        process = Absorbing()
    if type(process) not in _NAMES:
        raise ValueError(
            f"The process {type(process).__name__} cannot be saved with a model, whose samplers need it. Use "
            "Absorbing, Uniform or Hybrid."
        )
    settings: dict[str, Any] = {"process": _NAMES[type(process)]}
    for field in fields(process):  # pyright: ignore[reportArgumentType]
        value = getattr(process, field.name)
        if isinstance(value, Schedule):
            if type(value) not in _NAMES:
                raise ValueError(
                    f"The schedule {type(value).__name__} cannot be saved with a model, whose samplers need it. Use "
                    "one of multidiff.processes."
                )
            own = {part.name: getattr(value, part.name) for part in fields(value)}  # pyright: ignore
            value = {"schedule": _NAMES[type(value)], **own}
        settings[field.name] = value
    return settings


def from_settings(settings: Any, where: str) -> Process:
    """The process that `to_settings` described.

    Args:
        where: the file and key that they come from, for errors.

    Raises:
        ValueError: an unknown process, schedule or setting, or a bad value; it names `where`.
    """
    return _made(settings, "process", _PROCESSES, where)


def _made(settings: Any, kind: str, known: Mapping[str, Any], where: str) -> Any:
    if not isinstance(settings, Mapping):
        raise ValueError(f"{where}: expected a table with the key {kind}, got {settings!r}")
    name = settings.get(kind)
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{where}: {kind} {name!r} must be one of {', '.join(known)}")
    arguments = {key: value for key, value in settings.items() if key != kind}
    for key, value in arguments.items():
        if kind == "process" and key == "schedule":
            arguments[key] = _made(value, "schedule", _SCHEDULES, where)
        elif not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{where}: {key} must be a number, got {value!r}")
    try:
        return known[name](**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
