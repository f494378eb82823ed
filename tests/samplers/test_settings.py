"""Settings: kinds, ranges, contradictions, and what survives being saved."""

import doctest
import json
import math
from dataclasses import fields

import pytest
import torch

import multidiff.samplers.sampler
from multidiff.samplers import MaskSampler
from tests.helpers.sampling import run
from tests.helpers.toys import generator


def test_settings_survive_and_bad_ones_are_named(tmp_path):
    sampler = MaskSampler(order="random", unmasking="linear", top_p=0.9, canvas={"frames": 7})
    assert MaskSampler.from_settings(sampler.settings, "x").settings == sampler.settings
    sampler.save_pretrained(tmp_path)
    assert MaskSampler.from_pretrained(tmp_path).settings == sampler.settings
    with pytest.raises(ValueError, match=r"x.json: no sampler setting is called 'temprature'; did you mean 'tempe"):
        MaskSampler.from_settings({"temprature": 1}, "x.json")


def test_settings_survive_json():
    sampler = MaskSampler(
        forced_tokens={0: 2, 3: 1}, suppress_tokens=[5], guidance_scale={"text": 2.0}, canvas={"frames": 4}
    )
    again = MaskSampler.from_settings(json.loads(json.dumps(sampler.settings)), "x")
    assert again.settings == sampler.settings


def test_a_forced_place_that_is_no_number_is_a_sentence():
    with pytest.raises(ValueError, match=r"^here: forced_tokens {'x': 3} must be a table of whole numbers, place: id"):
        MaskSampler.from_settings({"forced_tokens": {"x": 3}}, "here")


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"order": "hilbert"}, "order 'hilbert' must be one of random, confidence"),
        ({"unmasking": "half"}, "unmasking 'half' must be one of linear, cosine"),
        ({"top_p": 0}, "top_p 0"),
        ({"temperature": -1}, "temperature -1 must be at least 0"),
        ({"num_inference_steps": 0}, "num_inference_steps 0"),
        ({"order": "random", "order_temperature": 1.0}, "order 'random' does not go with order_temperature 1.0"),
        ({"unmasking": "threshold", "threshold": 0.9, "order": "margin"}, "unmasking 'threshold' .* order 'margin'"),
        ({"unmasking": "entropy_bound", "entropy_bound": 0.1}, "unmasking 'entropy_bound' .* order 'confidence'"),
        (
            {"unmasking": "threshold", "threshold": 0.9, "num_inference_steps": 4},
            "unmasking 'threshold' .* num_inference_steps 4",
        ),
        ({"unmasking": "threshold"}, "unmasking 'threshold' needs threshold"),
        ({"threshold": 0.9}, "threshold 0.9 goes with unmasking threshold, not 'cosine'"),
        ({"eta": 0.1}, "eta 0.1 goes with remask cap or rescale or loop, not 'none'"),
        ({"remask": "cap", "eta": 0.1}, "remask 'cap' does not go with unmasking 'cosine'"),
        ({"remask": "cap", "order": "random", "unmasking": "ancestral"}, "remask 'cap' needs eta"),
        ({"order": "random", "unmasking": "ancestral", "block_length": 4}, "unmasking 'ancestral' .* block_length 4"),
        ({"temperature": "hot"}, "temperature 'hot' must be a number"),
        ({"temperature": math.nan}, "temperature nan must be a number"),
        ({"temperature": math.inf}, "temperature inf must be a number, at most 1,000,000"),
        ({"temperature": 1e-300}, "temperature 1e-300 must be 0, which is greedy, or at least"),
        ({"top_k": 10**400}, "must be a whole number, at most 1,000,000"),
        ({"forced_tokens": {"first": 1}}, "forced_tokens .* must be a table of whole numbers"),
        ({"guidance_scale": math.inf}, "guidance_scale inf must be a number or a table of numbers"),
        ({"guidance_scale": {"text": math.nan}}, "guidance_scale .* must be a number or a table of numbers"),
        ({"guidance_schedule": ["a", "b"], "guidance_scale": 2.0}, "guidance_schedule .* must be constant, linear"),
        ({"top_k": 2.5}, "top_k 2.5 must be a whole number"),
        ({"block_length": True}, "block_length True must be a whole number or 'level'"),
        ({"suppress_tokens": 5}, "suppress_tokens 5 must be a list of whole numbers"),
        ({"forced_tokens": [1]}, r"forced_tokens \[1\] must be a table of whole numbers"),
        ({"canvas": 5}, "canvas 5 must be a table of whole numbers"),
        ({"guidance_scale": "x"}, "guidance_scale 'x' must be a number or a table of numbers"),
        ({"num_inference_steps": 2.5}, "num_inference_steps 2.5 must be a whole number"),
        ({"exponent": 0.5, "unmasking": "power"}, "exponent 0.5 must be at least 1"),
        (
            {"unmasking": "factor", "factor": 1.0, "guidance_scale": 2.0, "guidance_schedule": "linear"},
            "unmasking 'factor' does not go with guidance_schedule 'linear'",
        ),
        ({"cache": "approximate_dual"}, "cache 'approximate_dual' does not go with block_length None"),
        (
            {"cache": "approximate_dual", "block_length": 4, "remask": "edit", "editing_threshold": 0.9},
            "cache .* remask 'edit'",
        ),
        ({"temperature": 0.0, "top_p": 0.9}, "temperature 0.0 does not go with top_p 0.9"),
        ({"block_length": "row"}, "block_length 'row' must be a whole number or 'level'"),
        ({"min_length": 3, "max_length": 2}, "min_length 3 is more than max_length 2"),
        ({"guidance_schedule": "linear"}, "guidance_schedule 'linear' needs guidance_scale"),
        ({"guidance_schedule": "sine", "guidance_scale": 2.0}, "guidance_schedule 'sine' must be"),
    ],
)
def test_contradictory_settings_are_named(options, names):
    with pytest.raises(ValueError, match=names):
        MaskSampler(**options)


def test_each_flat_setting_belongs_to_one_part_and_has_its_default():
    parts = MaskSampler().parts
    flat = {}
    for part in fields(parts):
        of_part = {field.name: field.default for field in fields(getattr(parts, part.name))}
        assert not flat.keys() & of_part.keys()
        flat |= of_part
    assert flat | {"canvas": None} == MaskSampler().settings


def test_the_setting_is_called_order_and_nothing_shadows_it():
    sampler = MaskSampler(order="random")
    assert sampler.config.order == "random"
    with pytest.warns(FutureWarning, match=r"order.* directly via 'MaskSampler' object attribute is deprecated"):
        assert sampler.order == "random"  # as all settings of diffusers' objects


def test_steps_that_a_run_asks_of_an_adaptive_sampler_are_refused():
    sampler = MaskSampler(unmasking="threshold", threshold=0.9)
    with pytest.raises(ValueError, match="num_inference_steps 4, but unmasking 'threshold' finds the number of steps"):
        run(sampler, torch.full((1, 3), 4), 4, lambda row_N: torch.zeros(3, 4), [generator()])


def test_the_example_in_the_docstring_runs():
    results = doctest.testmod(multidiff.samplers.sampler)
    assert results.attempted > 5
    assert results.failed == 0
