"""The adapter to lm-eval, where it is installed: its methods, and whole tasks by its own evaluator."""

import json
import math
import subprocess
import sys

import pytest
import torch

from multidiff import Masked, MaskSampler
from multidiff.evaluation import Target, log_likelihood
from multidiff.seeding import key_for
from multidiff_bpe import BPETokenizer
from tests.helpers.paths import ROOT
from tests.helpers.pipelines import make
from tests.helpers.toys import Grid

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from multidiff.evaluation.harness import MultiDiffLM

pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness and what it imports


@pytest.fixture(scope="module")
def pipe():
    samplers = {"text": MaskSampler(canvas={"tokens": 20}, num_inference_steps=20)}
    return make({"picture": Grid(3, 1, 2), "text": BPETokenizer()}, samplers)


def instances(kind, *arguments):
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def measured(pipe, document, key, draws=4):
    groups = [key_for(key) % 2**20]
    return log_likelihood(pipe, [document], draws=draws, replicates=1, groups=groups)[0].nats


def test_a_continuation_is_the_unknown_end_of_a_text(pipe):
    model = MultiDiffLM(pipe, draws=4)
    pairs = [("the cat ", "sat"), ("the cat ", "ran off"), ("", "dog"), ("dog", "")]
    values = model.loglikelihood(instances("loglikelihood", *pairs))
    assert len(values) == 4
    assert not any(greedy for _, greedy in values)
    for (context, continuation), (value, _) in zip(pairs, values, strict=True):
        (codes,) = pipe.tokenizers["text"].encode([context + continuation])
        known_N = torch.arange(len(codes)) < len(context.rstrip())  # the space belongs to the continuation
        exact = measured(pipe, [Masked("text", codes, known_N, 20 - len(codes))], context)
        assert value == pytest.approx(exact, rel=1e-9)
    ((again, _),) = model.loglikelihood(instances("loglikelihood", *pairs[:1]))
    assert again == pytest.approx(values[0][0], rel=1e-12)


def test_a_context_may_be_a_segment_of_its_own(pipe):
    model = MultiDiffLM(pipe, layout="segments", draws=4)
    (one, _), (other, _) = model.loglikelihood(instances("loglikelihood", ("what?", " a cat"), ("what?", "a cat")))
    assert one == pytest.approx(other, rel=1e-12)
    (third, _) = model.loglikelihood(instances("loglikelihood", ("who?", "a cat")))[0]
    assert abs(third - one) > 1e-6
    (alone, _) = model.loglikelihood(instances("loglikelihood", ("", "a cat")))[0]
    assert math.isfinite(alone)


def test_greedy_is_what_greedy_decoding_writes():
    pieces = BPETokenizer()
    letters = pieces.encode(["xyz "])[0].ids_N.tolist()
    others = sorted({*range(257)} - {*letters})
    pipe = make({"text": pieces}, {"text": MaskSampler(canvas={"tokens": 12}, suppress_tokens=others[:-1])})
    lengths = []
    for layout, context in (("text", "abc"), ("text", ""), ("segments", "the cat")):
        model = MultiDiffLM(pipe, layout=layout, draws=1)
        (written,) = model.generate_until(instances("generate_until", (context, {"until": []})))
        requests = instances("loglikelihood", (context, written), (context, f"{written}q"), (context, "abc"))
        assert [greedy for _, greedy in model.loglikelihood(requests)] == [True, False, False]
        lengths.append(len(written))
        if written[1:]:
            stopped = model.generate_until(instances("generate_until", (context, {"until": written[1]})))
            assert stopped == [written.split(written[1])[0]]
    assert max(lengths) > 1


def test_generation_stops_where_it_is_told(pipe):
    model = MultiDiffLM(pipe)
    requests = instances(
        "generate_until",
        ("ab ", {"until": [], "max_gen_toks": 3}),
        ("", {"until": [], "do_sample": True, "temperature": 2.0}),
        ("ab ", {"until": [], "do_sample": True, "temperature": 2.0}),
    )
    short, one, other = model.generate_until(requests)
    assert len(short.encode()) <= 3 * 3  # bytes that are no UTF-8 become a character of three
    assert one != other
    assert model.generate_until(requests) == [short, one, other]
    assert pipe.samplers["text"].settings["temperature"] == MaskSampler().settings["temperature"]


def test_whole_texts_end_with_their_eos(pipe):
    values = MultiDiffLM(pipe, draws=5).loglikelihood_rolling(
        instances("loglikelihood_rolling", ("seven",), ("a text that is longer than its canvas",))
    )
    for value, text, tokens in zip(values, ("seven", "a text that is longer than its canvas"), (20, 38), strict=True):
        assert value == pytest.approx(measured(pipe, [Target("text", text, tokens=tokens)], text, 5), rel=1e-9)


def test_unfit_models_are_refused(pipe):
    with pytest.raises(ValueError, match="layout must be text or segments, not 'chat'"):
        MultiDiffLM(pipe, layout="chat")
    with pytest.raises(ValueError, match="no tokenizer is called 'speech'"):
        MultiDiffLM(pipe, tokenizer="speech")
    with pytest.raises(ValueError, match="The tokenizer 'picture' is not one for text"):
        MultiDiffLM(pipe, tokenizer="picture")
    with pytest.raises(ValueError, match=r"This model has no tokenizer for text\. Its tokenizers are picture"):
        MultiDiffLM(make({"picture": Grid(3, 1, 2)}))


def test_the_tasks_of_the_repository_run(pipe):
    tasks = TaskManager(include_path=str(ROOT / "examples" / "lm_eval"))
    names = ["digit_captions", "digit_captions_bits"]
    results = simple_evaluate(
        MultiDiffLM(pipe, draws=2), tasks=names, task_manager=tasks, bootstrap_iters=0, log_samples=True
    )
    assert results["n-samples"]["digit_captions"]["effective"] == 40
    assert 0 <= results["results"]["digit_captions"]["acc,none"] <= 1
    # The bits of a uniform model: 256 codes and an EOS for each of 20 tokens of a canvas, by the bytes of the caption.
    assert 8 < results["results"]["digit_captions_bits"]["bits_per_byte,none"] < 40
    for sample in results["samples"]["digit_captions"]:
        assert sample["target"] == sample["doc"]["answer"]


def test_the_harness_has_the_model_on_its_command_line(tmp_path):
    pipe = make({"text": BPETokenizer()}, {"text": MaskSampler(canvas={"tokens": 16})}, torch.float32)
    pipe.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "multidiff.evaluation.harness", "run", "--model", "multidiff", "--model_args"]
    command += [f"pretrained={tmp_path / 'model'},draws=1", "--tasks", "digit_captions", "--limit", "2"]
    command += ["--include_path", "examples/lm_eval", "--output_path", str(tmp_path / "results.json")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not result.returncode, result.stderr
    assert "digit_captions" in result.stdout
    (written,) = tmp_path.glob("results*.json")
    assert json.loads(written.read_text())["config"]["model"] == "multidiff"
