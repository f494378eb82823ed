"""The sound tokenizer: the encodec package's own codes, whatever sound it is given; its training and its files."""

import json
import logging
import math
import os
import warnings
from dataclasses import asdict

import numpy as np
import pytest
import soundfile
import torch
from encodec.model import EncodecModel
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file

from demo.speech import SAMPLE_RATE, VOICES, Utterance, speak
from multidiff.testing import check_tokenizer
from multidiff.tokenizer import Audio, Codes, ItemError
from multidiff_encodec import EncodecTokenizer
from multidiff_encodec.data import SoundData
from multidiff_encodec.folder import inference_state, read_codec, write_codec
from multidiff_encodec.mel import MelLoss
from multidiff_encodec.model import PRESETS, CodecConfig, build_model, codebooks_of, mark_started
from multidiff_encodec.training import EncodecTraining
from multidiff_sound.sound import to_mono

TINY = {
    "ratios": (4, 2), "codebooks": 3, "codebook_size": 16, "dimension": 8, "encoder_filters": 4, "decoder_filters": 4,
    "lstm_layers": 1, "causal": False, "convolved_skip": False,
}  # fmt: skip
CONFIG = CodecConfig(8_000, **TINY)


def noise(samples, seed=0, channels=1, sample_rate=8_000):
    waveform_CT = 0.3 * torch.randn(channels, samples, generator=torch.Generator().manual_seed(seed))
    return Audio(waveform_CT.clamp(-1, 1), sample_rate)


def random_model(config=CONFIG, seed=0):
    """A codec whose codebooks are what its random encoder makes of noise."""
    model, generator = build_model(config, seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        residual_ND = model.encoder(noise(8 * 500).waveform[None])[0].T
        for book in codebooks_of(model.quantizer):
            book.start(residual_ND, generator)
            residual_ND = residual_ND - book.nearest(residual_ND)
    mark_started(model.quantizer)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codec")
    write_codec(random_model(), CONFIG, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return EncodecTokenizer(str(folder))


def test_weights_in_half_precision_are_half_as_large_and_read_as_float32(folder, tmp_path):
    model = random_model()
    write_codec(model, CONFIG, tmp_path, half_precision=True)
    half, whole = ((place / "model.safetensors").stat().st_size for place in (tmp_path, folder))
    assert half < 0.7 * whole  # names take their part of so small a file
    read = read_codec(tmp_path)[0].state_dict()
    for name, tensor in inference_state(model).items():
        assert torch.equal(read[name], tensor.half().float()), name


def test_contract(tokenizer, tmp_path):
    check_tokenizer(tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("weights", "rate", "frames", "size"), [("words-8khz", 8_000, 14, 64), ("words-16khz", 16_000, 28, 1024)]
)
def test_shipped_words_codecs(weights, rate, frames, size, tmp_path):
    shipped = EncodecTokenizer(weights)
    check_tokenizer(shipped, tmp_path)
    assert shipped.sample_rate == rate
    assert shipped.hop == 320
    assert set(shipped.codebook_sizes) == {size}
    seconds_T = torch.arange(4_400) / 8_000
    sweep = Audio(0.5 * torch.sin(2 * torch.pi * (150 + 1_500 * seconds_T) * seconds_T)[None], 8_000)
    (codes,) = shipped.encode([sweep])
    assert codes.size == {"frames": frames}
    assert shipped.dimensions(codes) == (frames * 320 / rate, "second")
    for level in range(len(shipped.codebook_sizes)):
        assert len(codes.ids_N[codes.levels_N == level].unique()) > 5


def test_the_codec_at_16_khz_keeps_a_spoken_word():
    """Each level brings it nearer, and all are far nearer than the same voice is that says another word."""
    voice = VOICES["test"][0]
    spoken, other = speak([Utterance("banana", voice, 140), Utterance("kitchen", voice, 140)], progress=False)
    sound = Audio(torch.from_numpy(spoken)[None], SAMPLE_RATE)
    loss, distances = MelLoss(16_000), []
    for levels in (1, 2, 3):
        codec = EncodecTokenizer("words-16khz", codebooks=levels)
        (restored,) = codec.decode(codec.encode([sound]))
        original_T = to_mono(sound, 16_000)
        distances.append(float(loss(restored.waveform[:, : len(original_T)], original_T[None])))
    assert distances == sorted(distances, reverse=True)
    other_T = to_mono(Audio(torch.from_numpy(other)[None], SAMPLE_RATE), 16_000)
    length = min(len(other_T), len(original_T))
    assert distances[-1] < 0.4 * float(loss(other_T[None, :length], original_T[None, :length]))


def test_codes_and_sound_are_those_of_the_package(tokenizer):
    model, sound = random_model(), noise(8 * 40)
    with torch.no_grad():
        ((expected_1Kt, _),) = model.encode(sound.waveform[None])
        expected_1CT = model.decode([(expected_1Kt, None)])
    (codes,) = tokenizer.encode([sound])
    assert torch.equal(codes.ids_N.view(-1, 3).T, expected_1Kt[0])
    assert len(codes.ids_N.unique()) > 10
    (restored,) = tokenizer.decode([codes])
    torch.testing.assert_close(restored.waveform, expected_1CT[0].clamp(-1, 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("convolved_skip", [False, True])
def test_a_folder_of_transformers_gives_the_same_codes_and_sound(tmp_path, causal, convolved_skip):
    import transformers

    transformers_config = transformers.EncodecConfig(
        sampling_rate=8_000, upsampling_ratios=[4, 2], num_filters=4, hidden_size=8, codebook_size=16,
        num_lstm_layers=1, target_bandwidths=[12.0], use_causal_conv=causal, use_conv_shortcut=convolved_skip,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = transformers.EncodecModel(transformers_config).eval()
        for layer in theirs.quantizer.layers:
            layer.codebook.embed.normal_(0, 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = EncodecTokenizer(str(tmp_path / "theirs"))
    assert ours.config.codebooks == theirs.config.num_quantizers == 3
    sound = noise(8 * 40)
    with torch.no_grad():
        expected_1Kt = theirs.encode(sound.waveform[None], bandwidth=12.0).audio_codes[0]
        expected_1CT = theirs.decode([expected_1Kt], [None]).audio_values
    (codes,) = ours.encode([sound])
    assert torch.equal(codes.ids_N.view(-1, 3).T, expected_1Kt[0])
    (restored,) = ours.decode([codes])
    torch.testing.assert_close(restored.waveform, expected_1CT[0].clamp(-1, 1), atol=1e-6, rtol=0)
    ours.save(tmp_path / "ours")
    assert EncodecTokenizer(str(tmp_path / "ours")).fingerprint == ours.fingerprint


def test_the_layout_of_metas_24_khz_checkpoint(tmp_path):
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*weight_norm", category=FutureWarning)
        meta = EncodecModel.encodec_model_24khz(pretrained=False)
        meta.set_target_bandwidth(1.5)
        for book in codebooks_of(meta.quantizer):
            book.codes_VD.normal_(0, 0.1)
    torch.save(meta.state_dict(), tmp_path / "encodec_24khz.th")
    tokenizer = EncodecTokenizer(str(tmp_path / "encodec_24khz.th"), codebooks=2)
    assert tokenizer.codebook_sizes == (1024, 1024)
    sound = noise(320 * 5, sample_rate=24_000)
    with torch.no_grad():
        ((expected_1Kt, _),) = meta.encode(sound.waveform[None])
    (codes,) = tokenizer.encode([sound])
    assert torch.equal(codes.ids_N.view(-1, 2).T, expected_1Kt[0])


def test_stereo_checkpoints_with_scales_are_refused(tmp_path):
    torch.save({"encoder.model.0.conv.norm.weight": torch.ones(32)}, tmp_path / "48khz.th")
    with pytest.raises(ValueError, match=r"48khz\.th.*scales"):
        EncodecTokenizer(str(tmp_path / "48khz.th"))
    (tmp_path / "48khz").mkdir()
    (tmp_path / "48khz" / "config.json").write_text('{"model_type": "encodec", "audio_channels": 2, "normalize": true}')
    save_file({"a": torch.ones(1)}, tmp_path / "48khz" / "model.safetensors")
    with pytest.raises(ValueError, match=r"48khz/config\.json.*scales"):
        EncodecTokenizer(str(tmp_path / "48khz"))


def test_fewer_codebooks_are_the_first_ones(folder, tokenizer, tmp_path):
    two, sound = EncodecTokenizer(str(folder), codebooks=2), noise(200)
    (all_three,), (first_two,) = tokenizer.encode([sound]), two.encode([sound])
    assert torch.equal(first_two.ids_N, all_three.ids_N[all_three.levels_N < 2])
    assert two.fingerprint != tokenizer.fingerprint
    two.save(tmp_path)
    assert EncodecTokenizer.load(tmp_path).codebook_sizes == (16, 16)
    with pytest.raises(ValueError, match="codebooks must be from 1 to 3"):
        EncodecTokenizer(str(folder), codebooks=4)


@settings(deadline=None, max_examples=8)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=6))
def test_batching_changes_nothing(tokenizer, lengths):
    sounds = [noise(length, seed) for seed, length in enumerate(lengths)]
    together = tokenizer.encode(sounds)
    restored = tokenizer.decode(together)
    for sound, codes, back in zip(sounds, together, restored, strict=True):
        (alone,) = tokenizer.encode([sound])
        assert torch.equal(codes.ids_N, alone.ids_N)
        assert torch.equal(back.waveform, tokenizer.decode([alone])[0].waveform)
        assert codes.size == {"frames": -(-sound.waveform.shape[1] // 8)}
        assert back.waveform.shape == (1, 8 * codes.size["frames"])


def test_codes_run_frame_by_frame(tokenizer):
    canvas = tokenizer.canvas(frames=2)
    assert canvas.levels_N.tolist() == [0, 1, 2, 0, 1, 2]
    assert canvas.coords_N3.tolist() == [[0, 0, 0], [0, 1, 0], [0, 2, 0], [1, 0, 0], [1, 1, 0], [1, 2, 0]]
    with pytest.raises(ValueError, match="must be a whole number"):
        tokenizer.canvas(frames=-1)


def test_sound_is_mixed_down_and_resampled(tokenizer):
    mono = noise(8 * 50)
    stereo = Audio(torch.cat([2 * mono.waveform, torch.zeros_like(mono.waveform)]), 8_000)
    (one,), (two,) = tokenizer.encode([mono]), tokenizer.encode([stereo])
    assert torch.equal(one.ids_N, two.ids_N)
    time_T = torch.arange(44_100) / 44_100
    fast = Audio(torch.sin(2 * torch.pi * 440 * time_T)[None], 44_100)
    (codes,) = tokenizer.encode([fast])
    assert codes.size == {"frames": 1_000}


def test_no_frames_are_a_sound_of_no_samples_that_can_be_seen_and_written(tokenizer, tmp_path):
    (empty,) = tokenizer.decode([tokenizer.canvas(frames=0)])
    assert empty.waveform.shape == (1, 0)
    assert min(tokenizer.preview(empty).size) > 0
    assert soundfile.info(tokenizer.write(empty, tmp_path / "empty")).frames == 0


@pytest.mark.parametrize(
    ("sound", "message"),
    [
        (Audio(torch.zeros(1, 0), 8_000), "without samples"),
        (Audio(torch.tensor([[0.0, float("nan")]]), 8_000), "NaN or infinite"),
        (Audio(torch.zeros(8), 8_000), "channels, samples"),
        ("a.wav", "channels, samples"),
    ],
)
def test_what_is_no_sound_is_an_error(tokenizer, sound, message):
    with pytest.raises(ItemError, match=message):
        tokenizer.encode([noise(80), sound])


def test_codes_that_are_none_are_an_error(tokenizer):
    canvas = tokenizer.canvas(frames=2)
    with pytest.raises(ValueError, match=r"\[0, 16\)"):
        tokenizer.decode([Codes(canvas.ids_N + 16, canvas.levels_N, canvas.coords_N3, canvas.size)])
    with pytest.raises(ValueError, match="6 codes, not 5"):
        tokenizer.decode([Codes(canvas.ids_N[:5], canvas.levels_N[:5], canvas.coords_N3[:5], canvas.size)])


def test_files_are_read_at_their_own_rate_and_bad_ones_named(tokenizer, tmp_path):
    soundfile.write(tmp_path / "stereo.flac", np.zeros((441, 2), np.float32), 44_100)
    sound = tokenizer.read("stereo.flac", tmp_path)
    assert sound.waveform.shape == (2, 441)
    assert sound.sample_rate == 44_100
    (tmp_path / "broken.wav").write_bytes(b"RIFF....WAVE")
    for name in ("broken.wav", "missing.wav"):
        with pytest.raises(ItemError, match=name):
            tokenizer.read(name, tmp_path)
    with pytest.raises(ItemError, match="path of its file"):
        tokenizer.read(7, tmp_path)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_wave_files_of_any_depth_are_read(tokenizer, tmp_path, subtype):
    ramp_T = np.linspace(-0.9, 0.9, 400, dtype=np.float32)
    soundfile.write(tmp_path / "a.wav", ramp_T, 8_000, subtype=subtype)
    np.testing.assert_allclose(tokenizer.read("a.wav", tmp_path).waveform[0], ramp_T, atol=0.01)


def test_floats_are_clipped_and_nan_is_named(tokenizer, tmp_path):
    soundfile.write(tmp_path / "loud.wav", np.array([0.5, 3.0, -2.0], np.float32), 8_000, subtype="FLOAT")
    assert tokenizer.read("loud.wav", tmp_path).waveform.tolist() == [[0.5, 1.0, -1.0]]
    soundfile.write(tmp_path / "nan.wav", np.array([0.5, np.nan], np.float32), 8_000, subtype="FLOAT")
    with pytest.raises(ItemError, match="NaN or infinite"):
        tokenizer.encode([tokenizer.read("nan.wav", tmp_path)])


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_files_that_end_too_soon_are_named(tokenizer, tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 8_000), 8_000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ItemError, match=rf"cut\.{suffix} is truncated"):
        tokenizer.read(path.name, tmp_path)


def test_absurd_lengths_are_refused_before_they_are_read(tokenizer, tmp_path):
    soundfile.write(tmp_path / "long.flac", np.zeros(3601 * 100, np.int16), 100)
    with pytest.raises(ItemError, match=r"long.flac lasts 3,601 s, but the limit is 3,600 s"):
        tokenizer.read("long.flac", tmp_path)


def test_written_sound_comes_back(tokenizer, tmp_path):
    sound = noise(100)
    path = tokenizer.write(sound, tmp_path / "a.b")
    assert path.name == "a.b.wav"
    back = tokenizer.read(path.name, tmp_path)
    torch.testing.assert_close(back.waveform, sound.waveform, atol=1e-4, rtol=0)


def break_config(folder, **changes):
    settings = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps(settings))


def break_weights(folder, change):
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"config\.json is missing"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"model\.safetensors is missing"),
        (lambda folder: os.truncate(folder / "model.safetensors", 500), r"model\.safetensors is truncated, damaged"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json is damaged"),
        (lambda folder: (folder / "config.json").write_text("[]"), r"config\.json must contain a JSON object"),
        (lambda folder: break_config(folder, foreign=1), r"config\.json.*unknown \['foreign'\]"),
        (lambda folder: break_config(folder, codebook_size=15), "must be a power of two"),
        (lambda folder: break_config(folder, dimension="wide"), "dimension of a codec cannot be 'wide'"),
        (lambda folder: break_config(folder, ratios=8), r"config\.json"),
        (lambda folder: break_config(folder, dimension=16), r"model\.safetensors: .*configuration needs"),
        (lambda folder: break_config(folder, codebooks=4), r"model\.safetensors .*1 tensors missing"),
        (lambda folder: break_config(folder, model_type="llama"), "got 'llama'"),
        (lambda folder: break_config(folder, residual_layers=10**9), "residual_layers is 1,000,000,000, which"),
        (lambda folder: break_config(folder, codebooks=10**12), "codebooks is 1,000,000,000,000, which does not fit"),
        (lambda folder: break_config(folder, ratios=[1] * 10**5), "needs 1 to 16 ratios, got 100,000"),
        (lambda folder: break_config(folder, codebook_size=2**40), r"model\.safetensors: .*configuration needs"),
        (lambda folder: break_config(folder, dimension=10**30), r"config\.json: EncodecModel cannot be built"),
        (lambda folder: break_config(folder, sample_rate=10**12), "at most 384,000 Hz"),
        (lambda folder: break_weights(folder, lambda state: {**state, "extra": torch.ones(1)}), "extra unexpected"),
    ],
)
def test_a_damaged_folder_is_named(folder, tmp_path, damage, message):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        EncodecTokenizer(str(tmp_path))


def test_weights_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"'nowhere' is neither.*words-8khz"):
        EncodecTokenizer("nowhere")
    with pytest.raises(ValueError, match="no shipped weights for '16khz'"):
        EncodecTokenizer("16khz")
    (tmp_path / "text.th").write_text("no checkpoint")
    with pytest.raises(ValueError, match=r"text\.th is damaged"):
        EncodecTokenizer(str(tmp_path / "text.th"))


def test_the_random_state_is_left_alone(folder):
    before = torch.get_rng_state()
    EncodecTokenizer(str(folder)).encode([noise(80)])
    build_model(CONFIG)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(
        build_model(CONFIG, 0).encoder.model[0].conv.conv.weight_v,
        build_model(CONFIG, 1).encoder.model[0].conv.conv.weight_v,
    )


def test_mel_loss_is_0_for_the_same_and_grows_with_the_difference():
    loss, sound = MelLoss(8_000), noise(2_000).waveform
    assert loss(sound, sound) == 0
    assert 0 < loss(0.9 * sound, sound) < loss(0.3 * sound, sound)


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    """A data folder of short tones, each of its own pitch."""
    folder = tmp_path_factory.mktemp("tones")
    lines = []
    for index in range(24):
        pitch, samples = 150 + 120 * index, 900 + 20 * index
        tone = 0.5 * np.sin(2 * np.pi * pitch * np.arange(samples) / 8_000)
        soundfile.write(folder / f"{index}.flac", tone, 8_000)
        split = "validation" if index % 6 == 0 else "train"
        lines.append(json.dumps({"split": split, "segments": [{"text": "a"}, {"speech": f"{index}.flac"}]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def fit(tones, output, ckpt_path=None, steps=40, **settings):
    common = {"learning_rate": 5e-3, "momentum": 0.8, "continuous_steps": 5, "warmup_steps": 5, **settings}
    training = EncodecTraining("words-8khz", str(output / "codec"), TINY, **common)
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ModelCheckpoint(output / "checkpoints", filename="{step}", every_n_train_steps=22, save_top_k=-1)],
    )  # fmt: skip
    data = SoundData(str(tones), sample_rate=8_000, samples=1_024, batch_size=4)
    trainer.fit(training, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


@pytest.mark.filterwarnings("ignore:.*num_workers.*", "ignore:.*exists and is not empty.*")
def test_training_uses_every_level_learns_and_resumes_to_the_same_weights(tones, tmp_path):
    metrics = fit(tones, tmp_path).callback_metrics
    for level in range(3):
        assert metrics[f"train/usage_{level}"] > 0.8
        assert metrics[f"train/perplexity_{level}"] > 8
    codec, config = read_codec(tmp_path / "codec")
    assert asdict(config) == asdict(CONFIG)

    waveform_BCT = next(iter(SoundData(str(tones), 8_000, 1_024).val_dataloader()))
    loss = MelLoss(8_000)
    with torch.no_grad():
        trained, untrained = (
            loss(model(waveform_BCT)[:, 0], waveform_BCT[:, 0]) for model in (codec, random_model(CONFIG))
        )
    assert trained < 0.97 * untrained

    expected = load_file(tmp_path / "codec" / "model.safetensors")
    fit(tones, tmp_path, ckpt_path=tmp_path / "checkpoints" / "step=22.ckpt")
    resumed = load_file(tmp_path / "codec" / "model.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


@pytest.mark.filterwarnings("ignore:.*num_workers.*", "ignore:.*exists and is not empty.*")
def test_an_adversary_sets_in_when_it_is_its_turn_and_resumes_to_the_same_weights(tones, tmp_path):
    settings = {"steps": 24, "muon": True, "adversary": 1.0, "adversary_from": 0.5, "discriminator_filters": 4}
    trainer = fit(tones, tmp_path, **settings)
    training = trainer.lightning_module
    assert training.balancer.steps_I.tolist() == [24, 12, 12]
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == pytest.approx([0.0, 0.0, 5e-4])
    assert trainer.callback_metrics["train/discriminator"] > 0
    assert trainer.callback_metrics["train/features"] > 0
    untouched = EncodecTraining("words-8khz", "unused", TINY, **{k: v for k, v in settings.items() if k != "steps"})
    names = dict(untouched.discriminator.named_parameters())
    assert any(not torch.equal(names[name], weight) for name, weight in training.discriminator.named_parameters())

    expected = load_file(tmp_path / "codec" / "model.safetensors")
    fit(tones, tmp_path, ckpt_path=tmp_path / "checkpoints" / "step=22.ckpt", **settings)
    resumed = load_file(tmp_path / "codec" / "model.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


@pytest.mark.filterwarnings("ignore:.*num_workers.*", "ignore:.*exists and is not empty.*")
def test_codebooks_start_from_the_same_latents_after_an_interruption(tones, tmp_path):
    fit(tones, tmp_path, steps=26, continuous_steps=22)
    expected = load_file(tmp_path / "codec" / "model.safetensors")
    interrupted = tmp_path / "checkpoints" / "step=22.ckpt"
    fit(tones, tmp_path, ckpt_path=interrupted, steps=26, continuous_steps=22)
    resumed = load_file(tmp_path / "codec" / "model.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


@pytest.mark.filterwarnings("ignore:.*num_workers.*", "ignore:.*exists and is not empty.*")
def test_a_training_that_is_resumed_at_its_end_writes_the_same_codec_again_and_is_evaluated(tones, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    fit(tones, tmp_path, steps=22)
    path = tmp_path / "codec" / "model.safetensors"
    first = path.read_bytes()
    path.unlink()
    trainer = fit(tones, tmp_path, ckpt_path=tmp_path / "checkpoints" / "step=22.ckpt", steps=22)
    assert trainer.global_step == 22
    assert path.read_bytes() == first
    assert f"Saved the tokenizer in {tmp_path / 'codec'}." in caplog.text

    # Of the folder's validation split, under the name of a test split.
    lines = (tones / "metadata.jsonl").read_text().replace('"validation"', '"test"')
    (tmp_path / "metadata.jsonl").write_text(lines.replace('{"speech": "', f'{{"speech": "{tones}/'))
    (metrics,) = trainer.test(
        trainer.lightning_module, datamodule=SoundData(str(tmp_path), samples=1_024), verbose=False
    )
    (expected,) = trainer.validate(
        trainer.lightning_module, datamodule=SoundData(str(tones), samples=1_024), verbose=False
    )
    assert {name.replace("val", "test"): value for name, value in expected.items()} == pytest.approx(metrics)
    codec = read_codec(tmp_path / "codec")[0]
    waveform_BCT = next(iter(SoundData(str(tones), 8_000, 1_024).val_dataloader()))
    with torch.no_grad():
        loss = MelLoss(8_000)(codec(waveform_BCT)[:, 0], waveform_BCT[:, 0])
    assert metrics["test/mel_3"] == pytest.approx(float(loss), rel=1e-3)


def test_rate_and_length_of_training_sounds_are_those_of_the_codec(tones):
    training = EncodecTraining("words-8khz", "unused", TINY)
    for data, words in (
        (SoundData(str(tones), 16_000), "sample_rate 16000, but preset 'words-8khz' has 8000"),
        (SoundData(str(tones), samples=1_001), "samples 1001, but preset 'words-8khz' needs a multiple of 8"),
    ):
        with pytest.raises(ValueError, match=words):
            Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).validate(training, datamodule=data)
    with pytest.raises(ValueError, match="Pass SoundData together with EncodecTraining"):
        SoundData(str(tones)).train_dataloader()


def test_training_data_is_cut_or_padded_and_the_same_for_the_same_seed(tones):
    one, same, other = (
        next(iter(SoundData(str(tones), 8_000, 1_024, seed=seed).train_dataloader())) for seed in (0, 0, 1)
    )
    assert one.shape == (16, 1, 1_024)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_training_names_what_is_missing(tones):
    with pytest.raises(ValueError, match="there is no codec size 'huge'; the sizes are words-8khz"):
        EncodecTraining("huge", "out")
    with pytest.raises(ValueError, match=r"settings of codec size '16khz': .*'depth'"):
        EncodecTraining("16khz", "out", {"depth": 3})
    with pytest.raises(ValueError, match="has no 'music' segment in split 'train'"):
        SoundData(str(tones), 8_000, 1_024, name="music").train_dataloader()


def test_segments_that_name_no_file_are_named(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"segments": [{"speech": ["a.wav"]}]}')
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 1: 'speech' must be the path of a file"):
        SoundData(str(tmp_path), 8_000, 1_024).train_dataloader()


def test_a_sound_longer_than_max_seconds_is_refused_before_it_is_encoded(tmp_path):
    tokenizer = EncodecTokenizer(max_seconds=0.5)
    assert tokenizer.fingerprint == EncodecTokenizer().fingerprint
    tokenizer.save(tmp_path)
    loaded = EncodecTokenizer.load(tmp_path)
    for one in (tokenizer, loaded):
        one.encode([Audio(torch.zeros(1, 4_000), 8_000)])
        with pytest.raises(ItemError, match=r"a sound of 1\.0 s is longer than max_seconds, 0\.5"):
            one.encode([Audio(torch.zeros(1, 8_000), 8_000)])
    for wrong in (0, math.inf, "5"):
        with pytest.raises(ValueError, match="max_seconds must be a finite number above 0"):
            EncodecTokenizer(max_seconds=wrong)


def test_presets_fit_their_names():
    assert {name: (config.sample_rate, config.hop) for name, config in PRESETS.items()} == {
        "words-8khz": (8_000, 320),
        "words-16khz": (16_000, 320),
        "8khz": (8_000, 320),
        "16khz": (16_000, 320),
        "24khz": (24_000, 320),
        "meta-24khz": (24_000, 320),
    }
