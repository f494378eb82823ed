"""transformers' codecs: its own codes and sound for each of the three kinds, and clear errors for any other folder."""

import json
import os
import re
import socket

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import DacConfig, DacModel, EncodecConfig, EncodecModel, MimiConfig, MimiModel

from multidiff.testing import check_tokenizer
from multidiff.tokenizer import Audio, ItemError
from multidiff_codec import CodecTokenizer
from multidiff_encodec import EncodecTokenizer
from multidiff_sound.tokenizer import _FRAMES_AT_ONCE

ENCODEC = {
    "sampling_rate": 8_000, "upsampling_ratios": [4, 2], "num_filters": 4, "hidden_size": 8, "codebook_size": 16,
    "num_lstm_layers": 1, "target_bandwidths": [4.0, 12.0],
}  # fmt: skip
DAC = {
    "sampling_rate": 8_000, "downsampling_ratios": [2, 4], "encoder_hidden_size": 4, "decoder_hidden_size": 16,
    "n_codebooks": 3, "codebook_size": 16, "codebook_dim": 4,
}  # fmt: skip
MIMI = {
    "sampling_rate": 8_000, "upsampling_ratios": [4, 2], "num_filters": 4, "hidden_size": 8, "codebook_size": 16,
    "codebook_dim": 4, "vector_quantization_hidden_dimension": 4, "num_quantizers": 3, "upsample_groups": 8,
    "num_hidden_layers": 1, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2,
    "sliding_window": 5,
}  # fmt: skip
HOPS = {"encodec": 8, "dac": 8, "dac-odd": 15, "mimi": 16}


def random_model(kind, seed=0):
    """A tiny model of random weights, its codebooks what its encoder makes of noise."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        sound_11T = noise(HOPS[kind] * 100).waveform[None]
        if kind == "encodec":
            model = EncodecModel(EncodecConfig(**ENCODEC)).eval()
            start([layer.codebook for layer in model.quantizer.layers], model.encoder(sound_11T)[0].T)
        elif kind == "mimi":
            model = MimiModel(MimiConfig(**MIMI)).eval()
            latents_1Dt = model.encoder(sound_11T).latents
            for part in ("semantic", "acoustic"):
                quantizer = model.quantizer.get_submodule(f"{part}_residual_vector_quantizer")
                start([layer.codebook for layer in quantizer.layers], quantizer.input_proj(latents_1Dt)[0].T)
        else:
            ratios = [3, 5] if kind == "dac-odd" else [2, 4]
            model = DacModel(DacConfig(**{**DAC, "downsampling_ratios": ratios})).eval()
            residual_1Dt = model.encoder(sound_11T)
            for level in model.quantizer.quantizers:
                level.codebook.weight.copy_(level.in_proj(residual_1Dt)[0].T[torch.randperm(100)[:16]])
                residual_1Dt = residual_1Dt - level(residual_1Dt)[0]
    return model


def start(codebooks, residual_ND):
    for book in codebooks:
        (book.embed_sum if hasattr(book, "embed_sum") else book.embed).copy_(residual_ND[torch.randperm(100)[:16]])
        residual_ND = residual_ND - book.decode(book.quantize(residual_ND))


def noise(samples, seed=0, channels=1, sample_rate=8_000):
    waveform_CT = 0.3 * torch.randn(channels, samples, generator=torch.Generator().manual_seed(seed))
    return Audio(waveform_CT.clamp(-1, 1), sample_rate)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each kind of model, as transformers saves it."""
    root = tmp_path_factory.mktemp("codecs")
    for kind in HOPS:
        random_model(kind).save_pretrained(root / kind)
    return {kind: root / kind for kind in HOPS}


@pytest.fixture(scope="module")
def tokenizers(folders):
    return {kind: CodecTokenizer(str(folder)) for kind, folder in folders.items()}


def copy(folder, to):
    to.mkdir(exist_ok=True)
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


@pytest.mark.parametrize("kind", HOPS)
def test_contract(tokenizers, kind, tmp_path):
    tokenizer = tokenizers[kind]
    assert (tokenizer.sample_rate, tokenizer.hop, tokenizer.codebook_sizes) == (8_000, HOPS[kind], (16, 16, 16))
    check_tokenizer(tokenizer, tmp_path)


def encode_directly(model, waveform_11T, levels):
    if isinstance(model, EncodecModel):
        return model.encode(waveform_11T, bandwidth=4.0 * levels).audio_codes[0]
    if isinstance(model, DacModel):
        return model.encode(waveform_11T, n_quantizers=levels).audio_codes
    return model.encode(waveform_11T, num_quantizers=levels).audio_codes


def decode_directly(model, codes_1Kt):
    if isinstance(model, EncodecModel):
        return model.decode(codes_1Kt[None], [None]).audio_values.flatten()
    if isinstance(model, DacModel):
        return model.decode(audio_codes=codes_1Kt).audio_values.flatten()
    return model.decode(codes_1Kt).audio_values.flatten()


@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("kind", HOPS)
def test_codes_and_sound_are_those_of_transformers(folders, kind, levels):
    tokenizer, model = CodecTokenizer(str(folders[kind]), num_codebooks=levels), random_model(kind)
    frames = _FRAMES_AT_ONCE[0] * 3 // 5  # alone in its batch: kernels for more rows add up in another order
    sound = noise(HOPS[kind] * frames)
    with torch.no_grad():
        expected_1Kt = encode_directly(model, sound.waveform[None], levels)
        expected_T = decode_directly(model, expected_1Kt)
    (codes,) = tokenizer.encode([sound])
    assert codes.size == {"frames": frames}
    assert torch.equal(codes.ids_N.view(-1, levels).T, expected_1Kt[0])
    assert len(codes.ids_N.unique()) > 5
    (restored,) = tokenizer.decode([codes])
    assert restored.waveform.shape == (1, frames * HOPS[kind])
    samples = len(expected_T)
    torch.testing.assert_close(restored.waveform[0, :samples], expected_T.clamp(-1, 1), atol=1e-6, rtol=0)
    assert not restored.waveform[0, samples:].any()
    assert samples == frames * HOPS[kind] - (4 if kind == "dac-odd" else 0)


def test_encodec_gives_the_codes_and_sound_of_the_other_plugin(folders, tokenizers):
    other, sounds = EncodecTokenizer(str(folders["encodec"])), [noise(333, seed) for seed in range(3)]
    ours, theirs = tokenizers["encodec"].encode(sounds), other.encode(sounds)
    for one, two in zip(ours, theirs, strict=True):
        assert torch.equal(one.ids_N, two.ids_N)
        assert torch.equal(one.coords_N3, two.coords_N3)
    for one, two in zip(tokenizers["encodec"].decode(ours), other.decode(theirs), strict=True):
        torch.testing.assert_close(one.waveform, two.waveform, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", HOPS)
@settings(deadline=None, max_examples=5)
@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=6))
def test_batching_changes_nothing(tokenizers, kind, lengths):
    tokenizer = tokenizers[kind]
    sounds = [noise(length, seed) for seed, length in enumerate(lengths)]
    together = tokenizer.encode(sounds)
    restored = tokenizer.decode(together)
    for sound, codes, back in zip(sounds, together, restored, strict=True):
        (alone,) = tokenizer.encode([sound])
        assert torch.equal(codes.ids_N, alone.ids_N)
        assert torch.equal(back.waveform, tokenizer.decode([alone])[0].waveform)
        assert codes.size == {"frames": -(-sound.waveform.shape[1] // HOPS[kind])}
        assert back.waveform.shape == (1, HOPS[kind] * codes.size["frames"])


@pytest.mark.parametrize("kind", HOPS)
def test_fewer_codebooks_are_the_first_ones(folders, tokenizers, kind, tmp_path):
    two, sound = CodecTokenizer(str(folders[kind]), num_codebooks=2, max_seconds=1.5), noise(200)
    (all_three,), (first_two,) = tokenizers[kind].encode([sound]), two.encode([sound])
    assert torch.equal(first_two.ids_N, all_three.ids_N[all_three.levels_N < 2])
    assert two.fingerprint != tokenizers[kind].fingerprint
    two.save(tmp_path)
    loaded = CodecTokenizer.load(tmp_path)
    assert (loaded.codebook_sizes, loaded.max_seconds) == ((16, 16), 1.5)
    assert loaded.fingerprint == two.fingerprint
    for number in (0, 4, True, "2"):
        with pytest.raises(ValueError, match=r"num_codebooks must be from 1 to 3, .*model\.safetensors"):
            CodecTokenizer(str(folders[kind]), num_codebooks=number)


def test_semantic_levels_are_always_used(folders, tmp_path):
    model = MimiModel(MimiConfig(**MIMI, num_semantic_quantizers=2))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_codebooks must be from 2 to 3"):
        CodecTokenizer(str(tmp_path), num_codebooks=1)


@pytest.mark.parametrize("kind", HOPS)
def test_transformers_reads_what_is_saved(tokenizers, kind, tmp_path):
    tokenizers[kind].save(tmp_path)
    again, report = type(random_model(kind)).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    for name, tensor in random_model(kind).state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_mimis_frame_rate_is_what_its_configuration_says(folders, tmp_path):
    copy(folders["mimi"], tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    for name in ("frame_rate", "_frame_rate"):  # as the first checkpoints have it, as transformers writes it now
        rest = {key: value for key, value in settings.items() if key != "_frame_rate"}
        (tmp_path / "config.json").write_text(json.dumps({**rest, name: 500.0}))
        assert CodecTokenizer(str(tmp_path)).hop == 16
        (tmp_path / "config.json").write_text(json.dumps({**rest, name: 250.0}))
        with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
            CodecTokenizer(str(tmp_path))


def test_weights_in_half_precision_and_under_older_names_are_read(folders, tokenizers, tmp_path):
    copy(folders["encodec"], tmp_path)
    older = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): tensor
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    save_file(older, tmp_path / "model.safetensors")
    sound = noise(400)
    (expected,), (codes,) = tokenizers["encodec"].encode([sound]), CodecTokenizer(str(tmp_path)).encode([sound])
    assert torch.equal(codes.ids_N, expected.ids_N)

    save_file({name: tensor.bfloat16() for name, tensor in older.items()}, tmp_path / "model.safetensors")
    half = CodecTokenizer(str(tmp_path))
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}
    half.save(tmp_path / "saved")
    assert CodecTokenizer.load(tmp_path / "saved").fingerprint == half.fingerprint


def test_reading_is_quiet_and_leaves_the_random_state_alone(folders, capfd):
    before = torch.get_rng_state()
    for folder in folders.values():
        CodecTokenizer(str(folder)).encode([noise(80)])
    assert torch.equal(before, torch.get_rng_state())
    assert capfd.readouterr() == ("", "")


def test_nothing_else_in_the_folder_is_followed(folders, tokenizers, tmp_path):
    copy(folders["mimi"], tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else", "peft_type": "LORA"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"no model")
    change_config(
        tmp_path, auto_map={"AutoModel": "code.Model"}, _attn_implementation="someone/kernel",
        quantization_config={"quant_method": "awq"},
    )  # fmt: skip
    sound = noise(100)
    (expected,), (codes,) = tokenizers["mimi"].encode([sound]), CodecTokenizer(str(tmp_path)).encode([sound])
    assert torch.equal(codes.ids_N, expected.ids_N)


def test_a_file_that_changes_later_changes_nothing(folders, tmp_path):
    tokenizer = CodecTokenizer(str(copy(folders["dac"], tmp_path)))
    (before,) = tokenizer.encode([noise(400)])
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.seek(os.path.getsize(file.name) // 2)
        file.truncate()
        file.write(bytes(1_000))
    (after,) = tokenizer.encode([noise(400)])
    assert torch.equal(before.ids_N, after.ids_N)
    tokenizer.save(tmp_path)
    assert CodecTokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint


def test_mimis_codebooks_move_with_the_model(folders):
    tokenizer = CodecTokenizer(str(folders["mimi"]))
    tokenizer.encode([noise(80)])
    tokenizer.to("meta")
    book = tokenizer.model.model.quantizer.semantic_residual_vector_quantizer.layers[0].codebook
    assert book.embed.device.type == "meta"


@pytest.mark.parametrize(
    ("sound", "message"),
    [
        (Audio(torch.zeros(1, 0), 8_000), "without samples"),
        (Audio(torch.tensor([[0.0, float("nan")]]), 8_000), "NaN or infinite"),
        (Audio(torch.zeros(2, 44_100 * 121), 44_100), r"121\.0 s is longer than max_seconds, 120\. Split it"),
        ("a.wav", "channels, samples"),
    ],
)
def test_what_is_no_sound_or_too_long_is_an_error(tokenizers, sound, message):
    with pytest.raises(ItemError, match=message):
        tokenizers["dac"].encode([noise(80), sound])


def change_config(folder, **changes):
    settings = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps(settings))


def change_weights(folder, change):
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


def pickle_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_the_first(state):
    return {name: state[name] for name in sorted(state)[1:]}


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("dac", lambda folder: (folder / "config.json").unlink(), r"config\.json is missing"),
        ("dac", lambda folder: (folder / "config.json").write_text("{"), r"config\.json is damaged"),
        ("dac", lambda folder: (folder / "config.json").write_text("[]"), r"config\.json must contain a JSON object"),
        ("dac", lambda folder: (folder / "model.safetensors").unlink(), r"model\.safetensors is missing"),
        (
            "dac",
            lambda folder: os.truncate(folder / "model.safetensors", 500),
            r"model\.safetensors is truncated, damaged",
        ),
        ("dac", pickle_weights, r"pytorch_model\.bin contains pickled weights.*save_pretrained"),
        ("dac", lambda folder: change_config(folder, model_type="llama"), r"model_type must be .* got 'llama'"),
        ("dac", lambda folder: change_config(folder, model_type=["dac"]), r"model_type must be .* got \['dac'\]"),
        ("dac", lambda folder: change_config(folder, sampling_rate="fast"), r"config\.json: DacModel cannot be built"),
        ("dac", lambda folder: change_config(folder, sampling_rate=0), r"config\.json: .* from 1 to 384000, got 0"),
        ("dac", lambda folder: change_config(folder, n_codebooks=4), r"model\.safetensors does not .* and 2 more"),
        ("dac", lambda folder: change_config(folder, codebook_size=32), r"codebook.weight is \[16, 4\], not \[32, 4\]"),
        ("dac", lambda folder: change_config(folder, n_codebooks=10**9), r"config\.json: n_codebooks is 1,000,000,000"),
        ("dac", lambda folder: change_config(folder, hidden_size=10**9), r"config\.json: DacModel .* numbers, but"),
        ("dac", lambda folder: change_config(folder, sampling_rate=10**12), r"config\.json: .* from 1 to 384000"),
        (
            "encodec",
            lambda folder: change_config(folder, target_bandwidths=[1e15]),
            r"config\.json: .*num_quantizers is",
        ),
        (
            "mimi",
            lambda folder: change_config(folder, upsampling_ratios=[1] * 10**6),
            "the length of upsampling_ratios",
        ),
        (
            "mimi",
            lambda folder: change_config(folder, codebook_size=2**40),
            r"config\.json: MimiModel .* numbers, but",
        ),
        ("dac", lambda folder: change_config(folder, downsampling_ratios=[2, 1]), r"config\.json"),
        ("encodec", lambda folder: change_config(folder, audio_channels=2), r"config\.json .* 2 channels.*mono"),
        ("encodec", lambda folder: change_config(folder, normalize=True), r"config\.json .*scales"),
        ("encodec", lambda folder: change_config(folder, chunk_length_s=1.0), r"config\.json: chunk_length_s"),
        ("encodec", lambda folder: change_weights(folder, without_the_first), r"model\.safetensors .* is missing"),
        ("mimi", lambda folder: change_config(folder, audio_channels=2), r"config\.json .* 2 channels.*mono"),
        ("mimi", lambda folder: change_config(folder, decoder_config=None), r"config\.json.*does not"),
        ("mimi", lambda folder: change_weights(folder, without_the_first), r"model\.safetensors .* is missing"),
        (
            "mimi",
            lambda folder: change_weights(folder, lambda state: {**state, "extra": torch.ones(1)}),
            "extra is not expected",
        ),
    ],
)
def test_a_folder_that_is_no_codec_is_named(folders, tmp_path, kind, damage, message, capfd):
    copy(folders[kind], tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        CodecTokenizer(str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert capfd.readouterr() == ("", "")


def test_settings_that_are_none_are_named(folders, tmp_path):
    with pytest.raises(ValueError, match=r"someone/codec is not a folder.*Nothing is downloaded"):
        CodecTokenizer("someone/codec")
    for number in (-1, float("nan"), float("inf"), "long"):
        with pytest.raises(ValueError, match="max_seconds must be a finite number above 0"):
            CodecTokenizer(str(folders["dac"]), max_seconds=number)
    with pytest.raises(ValueError, match=r"codec\.json does not exist.*`weights`"):
        CodecTokenizer.load(folders["dac"])
    copy(folders["dac"], tmp_path)
    (tmp_path / "codec.json").write_text('{"num_codebooks": 2, "levels": 2}')
    with pytest.raises(ValueError, match=r"codec\.json must contain num_codebooks and max_seconds"):
        CodecTokenizer.load(tmp_path)
