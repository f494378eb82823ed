"""Solve rates of models that know what they answer, and of `scripts/evaluate.py planning`."""

import importlib.util
import json
import math
from types import SimpleNamespace

import pytest

from demo.planning.corpus import prepare
from demo.planning.path_star import PathStar
from demo.planning.solving import SolveRate, measure, read_problems
from demo.planning.sudoku import Sudoku
from multidiff import MultiDiffPipeline
from multidiff.sequence import AttentionPattern
from multidiff_bpe import BPETokenizer
from multidiff_grid import GridTokenizer
from tests.helpers import pipelines
from tests.helpers.paths import ROOT


class Oracle:
    """A pipeline that knows the answers. To some questions it gives the wrong one."""

    def __init__(self, tokenizers, problems, knows, attention="full"):
        self.tokenizers, self.samplers = tokenizers, {}
        self.transformer = SimpleNamespace(pattern=AttentionPattern(attention))
        self.answers = {question: answer if knows(question) else question for question, answer in problems}
        self.asked = []

    def set_progress_bar_config(self, disable):
        assert disable

    def __call__(self, documents, generator):
        self.asked.append((dict(self.samplers), documents, [one.initial_seed() for one in generator]))
        filled = [[given, SimpleNamespace(item=self.answers[given.item])] for given, _ in documents]
        return SimpleNamespace(documents=filled)


@pytest.fixture(scope="module")
def boards(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("boards") / "data", Sudoku(4), train=5, held_out=40)


@pytest.fixture(scope="module")
def stars(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("stars") / "data", PathStar(2, 3), train=20, held_out=6)


def test_rates_count_what_the_verifier_accepts(boards):
    """A model that solves puzzles of 7 givens and more."""
    problems = read_problems(boards)["test"]
    givens = [Sudoku(4).givens(question) for question, _ in problems]
    oracle = Oracle({"grid": GridTokenizer("_1234")}, problems, lambda question: Sudoku(4).givens(question) >= 7)
    rates = measure(oracle, boards, None, 30, seed=0, batch=7)
    assert list(rates) == ["confidence", "margin", "row_scan", "random"]
    right = sum(number >= 7 for number in givens[:30])
    assert 0 < right < 30
    for by_givens in rates.values():
        assert by_givens["all"] == SolveRate(right, 30)
        assert list(by_givens)[1:] == [str(number) for number in sorted(set(givens[:30]))]
        for number in set(givens[:30]):
            there = givens[:30].count(number)
            assert by_givens[str(number)] == SolveRate(there if number >= 7 else 0, there)


def test_each_order_decides_a_cell_a_step_on_canvases_of_answers(stars):
    problems = read_problems(stars)["test"]
    oracle = Oracle({"text": BPETokenizer()}, problems, lambda question: True)
    rates = measure(oracle, stars, ["left_to_right", "random"], 6, seed=5, batch=4)
    assert rates == {order: {"all": SolveRate(6, 6)} for order in ("left_to_right", "random")}
    assert [len(documents) for _, documents, _ in oracle.asked] == [4, 2, 4, 2]
    samplers = [samplers["text"] for samplers, _, _ in oracle.asked]
    assert [sampler.config.order for sampler in samplers] == ["left_to_right"] * 2 + ["random"] * 2
    assert {sampler.num_inference_steps for sampler in samplers} == {4}
    blanks = {tuple(blank.size.items()) for _, documents, _ in oracle.asked for _, blank in documents}
    assert blanks == {(("tokens", 4),)}  # three nodes and the EOS
    seeds = [seed for _, _, seeds in oracle.asked for seed in seeds]
    assert seeds[:6] == seeds[6:]
    assert len(set(seeds)) == 6


def test_an_autoregressive_model_has_one_order(boards, stars):
    for folder, name, tokenizer, order in (
        (boards, "grid", GridTokenizer("_1234"), "row_scan"),
        (stars, "text", BPETokenizer(), "left_to_right"),
    ):
        oracle = Oracle({name: tokenizer}, read_problems(folder)["test"], lambda question: True, attention="causal")
        assert list(measure(oracle, folder, None, 5, seed=0, batch=5)) == [order]
        with pytest.raises(ValueError, match=f"decides its answers in the order {order}"):
            measure(oracle, folder, ["confidence"], 5, seed=0, batch=5)


def test_standard_error_is_that_of_a_share():
    rate = SolveRate(30, 40)
    assert rate.rate == 0.75
    assert rate.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 40))
    assert str(rate) == "0.750 ± 0.068"


def test_a_model_without_the_tokenizer_is_refused(boards):
    oracle = Oracle({"text": BPETokenizer()}, [], lambda question: True)
    with pytest.raises(ValueError, match=r"The model has no tokenizer 'grid', .* It has text"):
        measure(oracle, boards, None, 5, seed=0, batch=5)


@pytest.mark.filterwarnings("error")
def test_the_script_prints_a_table_of_a_saved_model(stars, tmp_path, monkeypatch, capsys):
    pipeline: MultiDiffPipeline = pipelines.make({"text": BPETokenizer()})
    pipeline.save_pretrained(tmp_path / "model")
    spec = importlib.util.spec_from_file_location("evaluate", ROOT / "scripts" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*options):
        command = ["evaluate.py", "planning", "--model", str(tmp_path / "model"), "--data", str(stars), *options]
        monkeypatch.setattr("sys.argv", command)
        module.main()
        return capsys.readouterr().out.splitlines()

    head, row, last = run("--orders", "margin", "random", "--num-samples", "3")
    assert head.split() == ["givens", "problems", "margin", "random"]
    assert row.split() == ["all", "3", *["0.000", "±", "0.000"] * 2]  # it has learned nothing
    assert json.loads(last)["margin"] == {"all": {"problems": 3, "solved": 0.0, "standard_error": 0.0}}
    with pytest.raises(SystemExit, match="--num-samples and --batch must be at least 1"):
        run("--num-samples", "0")
    with pytest.raises(SystemExit, match=r"evaluate.py: .*order"):
        run("--orders", "row_scan")
