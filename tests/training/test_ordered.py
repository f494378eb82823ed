"""Autoregressive models and block diffusion by the command line: trained, measured, saved, generated from, refused."""

import pytest
import torch

from multidiff import Blank, Given, MultiDiffPipeline
from multidiff.cli import main
from multidiff.evaluation import EvaluationBatch, likelihood
from multidiff.objectives import Objective
from multidiff.sequence import AttentionPattern
from multidiff.training import MaskedDiffusionModule
from tests.helpers.runs import WORDS, config, scalars, write_config, write_folder

TOKENIZERS = {"text": {"plugin": "bpe"}}
PATTERNS = {
    "causal": {"attention": "causal"},
    "blocks": {"attention": "block_causal", "block_length": 2},
    "segments": {"attention": "block_causal", "block_length": "segment"},
}


def measured(path):
    """Nats of eight documents under a model."""
    pipe = MultiDiffPipeline.from_pretrained(path)
    parts = {"text": WORDS, "shout": [word.upper() for word in WORDS]}
    codes = {name: pipe.tokenizers[name].encode(words) for name, words in parts.items()}
    documents = [[pipe.sequencer.given(name, codes[name][number]) for name in parts] for number in range(len(WORDS))]
    batch = EvaluationBatch(pipe.sequencer.batch(documents), range(len(WORDS)), [True] * len(WORDS), seed=0)
    return float(likelihood(pipe.transformer, pipe.vocabulary, batch, "joint", draws=4)[0].sum())


@pytest.mark.parametrize("name", PATTERNS)
def test_train_measure_and_generate(tmp_path, capsys, name):
    write_folder(tmp_path / "data")
    settings = config(tmp_path)
    settings["model"]["init_args"]["transformer"] |= {"num_layers": 2, **PATTERNS[name]}
    path = write_config(tmp_path, settings)
    main(["fit", "--config", path])
    values = scalars(tmp_path)
    losses = list(values["loss"].values())
    assert {"train/text", "validation/text/conditional", "validation/joint"} <= values.keys()
    assert measured(tmp_path / "checkpoints" / "8.ckpt") < measured(tmp_path / "checkpoints" / "1.ckpt")
    if name == "causal":  # the loss is the likelihood, and its tokens include padding EOS
        assert values["train/text"][0] == pytest.approx(losses[0], rel=0.5)
    checkpoint = str(tmp_path / "checkpoints" / "8.ckpt")
    main(["fit", "--config", path, "--ckpt_path", str(tmp_path / "checkpoints" / "5.ckpt")])  # resumes
    assert list(scalars(tmp_path)["loss"].values())[-3:] == losses[-3:]
    main(["test", "--config", path, "--ckpt_path", checkpoint])
    capsys.readouterr()
    main(["generate", "--model", str(tmp_path / "model"), "--given", "text=one", "--fill", "shout:tokens=900"])
    first = capsys.readouterr().out
    main(["generate", "--model", checkpoint, "--given", "text=one", "--fill", "shout:tokens=900"])
    assert capsys.readouterr().out == first
    pipe = MultiDiffPipeline.from_pretrained(tmp_path / "model")
    assert pipe.transformer.pattern == AttentionPattern(**PATTERNS[name])
    pipe.set_progress_bar_config(disable=True)
    made = [
        pipe([[Given("text", "one"), Blank("shout", tokens=900)]], generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert made[0].documents[0][1].item == made[1].documents[0][1].item
    assert 1 <= made[0].nfe[0] <= 900
    with pytest.warns(UserWarning, match="not of 301"):  # what is given is seen
        pipe([[Given("text", "o" * 300), Blank("shout", tokens=1)]], generator=torch.Generator())


@pytest.mark.parametrize(
    ("transformer", "more", "message"),
    [
        (
            {"attention": "block_causal", "block_length": 0},
            {},
            "model.transformer: block_length must be a whole number",
        ),
        ({"attention": "block_causal"}, {}, "model.transformer: attention 'block_causal' needs a block_length"),
        ({"attention": "causal", "block_length": 3}, {}, "block_length 3 goes with attention 'block_causal'"),
        ({"attention": "left"}, {}, "attention must be full, causal or block_causal, not 'left'"),
        (
            {"attention": "causal"},
            {"samplers": {"text": {"cache": "approximate_dual", "block_length": 1}}},
            "model.samplers, text: The sampler of 'text': cache 'approximate_dual' does not go with",
        ),
        ({}, {"samplers": {"text": {"cache": "exact"}}}, "cache 'exact' does not go with a model of full attention"),
        (
            {"attention": "block_causal", "block_length": 16},
            {"samplers": {"text": {"block_length": 8}}},
            "block_length 8 does not go with a model of block_causal attention with block_length 16",
        ),
        ({"attention": "causal"}, {"objective": Objective(times=(0.1, 0.9))}, "objective's times has no meaning"),
    ],
)
def test_what_does_not_fit_is_refused_before_data_are_read(transformer, more, message):
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2}
    with pytest.raises(ValueError, match=message):
        MaskedDiffusionModule(TOKENIZERS, {**sizes, **transformer}, **more)
