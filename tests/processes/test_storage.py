"""Processes as settings in files."""

import json
from dataclasses import dataclass

import pytest

from multidiff.processes import (
    Absorbing,
    Cosine,
    CosineSquared,
    Geometric,
    Hybrid,
    LogLinear,
    Polynomial,
    Uniform,
    from_settings,
    to_settings,
)


@dataclass(frozen=True)
class Own(LogLinear):
    """A schedule of one's own."""


@pytest.mark.parametrize(
    "schedule", [LogLinear(0.01), Cosine(), CosineSquared(), Polynomial(3.0), Geometric(1e-5, 30.0)]
)
@pytest.mark.parametrize("make", [Absorbing, Uniform, lambda schedule: Hybrid(schedule, 0.2)])
def test_a_process_comes_back(make, schedule):
    process = make(schedule)
    assert from_settings(json.loads(json.dumps(to_settings(process))), "processes.json, image") == process


def test_what_files_cannot_name_is_refused_where_samplers_need_it():
    assert to_settings(Absorbing(Own())) == to_settings(Absorbing())
    with pytest.raises(ValueError, match="The schedule Own cannot be saved with a model"):
        to_settings(Uniform(Own()))

    class OwnProcess(Uniform):
        """A process of one's own."""

    with pytest.raises(ValueError, match="The process OwnProcess cannot be saved with a model"):
        to_settings(OwnProcess())


@pytest.mark.parametrize(("settings", "message"), [
    ([], r"expected a table with the key process, got \[\]"),
    ({}, "process None must be one of absorbing, uniform, hybrid"),
    ({"process": []}, r"process \[\] must be one of"),
    ({"process": "os.system"}, "process 'os.system' must be one of"),
    ({"process": "uniform", "schedule": "cosine"}, "expected a table with the key schedule, got 'cosine'"),
    ({"process": "uniform", "schedule": {"schedule": "cosine", "epsilon": "0"}}, "epsilon must be a number, got '0'"),
    ({"process": "uniform", "schedule": {"schedule": "log_linear", "epsilon": -0.05}}, "does not run from clean"),
    ({"process": "uniform", "schedule": {"schedule": "geometric", "smallest": 9.0, "largest": 1.0}}, "0 < smallest"),
    ({"process": "hybrid", "uniform_share": 2}, "uniform_share 2 .* must be between 0 and 1"),
    ({"process": "hybrid", "share": 0.1}, "share"),
])  # fmt: skip
def test_bad_settings_name_the_file(settings, message):
    with pytest.raises(ValueError, match=rf"processes\.json, image: .*{message}"):
        from_settings(settings, "processes.json, image")
