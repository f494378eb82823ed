"""Any `tokenizer.json` as a text tokenizer: its pieces are codes, its special tokens are not, its faults are named."""

import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from multidiff import plugins
from multidiff.testing import check_tokenizer
from multidiff.tokenizer import ItemError
from multidiff_bpe import BPETokenizer
from multidiff_bpe.pieces import spell_byte

TEXTS = ["a handwritten seven", "the digit seven, or two", "someone says eleven 7"] * 5
ASCII = [chr(character) for character in range(32, 127)]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _trained(tokenizer, trainer, **options):
    tokenizer.train_from_iterator(TEXTS, trainer(show_progress=False, **options))
    return json.loads(tokenizer.to_str())


def _gpt():
    """Byte-level BPE, a special token first, one last, and a plain one between."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    state = _trained(
        tokenizer, trainers.BpeTrainer, vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet
    )
    size = len(state["model"]["vocab"])
    state["added_tokens"] += [_added("<tool>", size, special=False), _added("<|start|>", size + 1, special=True)]
    return state


def _qwen():
    return _gpt() | {"normalizer": {"type": "NFC"}}


def _prefix_space():
    state = _gpt()
    state["pre_tokenizer"]["add_prefix_space"] = True
    return state


def _llama():
    """BPE of characters that falls back to bytes, as converted from SentencePiece."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = ["<unk>", "<s>", "</s>"]
    state = _trained(
        tokenizer,
        trainers.BpeTrainer,
        vocab_size=420,
        special_tokens=special + BYTES,
        initial_alphabet=[*ASCII, "▁"],
    )
    state["added_tokens"] = state["added_tokens"][:3]
    return state


def _unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "<s>", "<unk>"]
    return _trained(
        tokenizer,
        trainers.UnigramTrainer,
        vocab_size=150,
        unk_token="<unk>",
        special_tokens=special,
        initial_alphabet=ASCII,
    )


def _unigram_bytes():
    state = _unigram()
    state["model"]["vocab"] += [[piece, -20.0] for piece in BYTES]
    state["model"]["byte_fallback"] = True
    state["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, state["decoder"]]}
    return state


def _bert():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    state = _trained(
        tokenizer, trainers.WordPieceTrainer, vocab_size=250, special_tokens=special, initial_alphabet=ASCII
    )
    vocabulary = state["model"]["vocab"]
    for character in ASCII:
        vocabulary.setdefault(f"##{character.lower()}", len(vocabulary))
    state["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    return state


def _words():
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _trained(tokenizer, trainers.WordLevelTrainer, special_tokens=["[UNK]", "[CLS]"])


def _bases():
    """No unknown token: the library itself leaves out, silently, whatever is no base."""
    tokenizer = Tokenizer(models.BPE(vocab={base: rank for rank, base in enumerate("ACGT")}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return json.loads(tokenizer.to_str())


FILES = [_gpt, _qwen, _prefix_space, _llama, _unigram, _unigram_bytes, _bert, _words, _bases]


def _added(content, index, special):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": index, "content": content, "special": special, **flags}


@pytest.fixture
def written(tmp_path):
    def write(state):
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(state, indent=1), encoding="utf-8")
        return path

    return write


@pytest.fixture(params=FILES, ids=lambda make: make.__name__[1:])
def path(request, written):
    return written(request.param())


def test_contract(path, tmp_path):
    tokenizer = BPETokenizer(str(path))
    check_tokenizer(tokenizer, tmp_path)
    assert len(tokenizer.examples()) > 1


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(words=st.lists(st.sampled_from(["a", "handwritten", "seven,", "eleven", "digit", "ACGT", "GATT"]), max_size=6))
def test_codes_are_the_librarys_ids_counted_anew(path, words):
    theirs, ours, text = Tokenizer.from_file(str(path)), BPETokenizer(str(path)), " ".join(words)
    theirs.no_truncation()
    try:
        (codes,) = ours.encode([text])
    except ItemError:
        return
    ids = theirs.encode(text, add_special_tokens=False).ids
    assert [ours.file_ids[code] for code in codes.ids_N] == ids
    assert ours.decode([codes]) == [theirs.decode(ids)]


def test_all_but_special_tokens_are_codes_without_gaps(path):
    theirs, ours = Tokenizer.from_file(str(path)), BPETokenizer(str(path))
    special = {index for index, token in theirs.get_added_tokens_decoder().items() if token.special}
    assert ours.file_ids == sorted(set(theirs.get_vocab().values()) - special)
    assert ours.codebook_sizes == (len(ours.file_ids),)


def test_gaps_in_the_files_ids_leave_none_in_the_codes(written):
    state = _gpt()
    vocabulary = state["model"]["vocab"]
    state["model"]["vocab"] = {token: 3 * index for token, index in vocabulary.items()}
    state["added_tokens"] = []
    ours = BPETokenizer(str(written(state)))
    assert ours.codebook_sizes == (len(vocabulary),)
    assert ours.file_ids == [3 * index for index in range(len(vocabulary))]
    assert ours.decode(ours.encode(["seven 你"])) == ["seven 你"]


@pytest.mark.parametrize("make", [_gpt, _qwen, _llama, _unigram, _unigram_bytes], ids=lambda make: make.__name__[1:])
def test_text_that_spells_a_special_token_is_ordinary_text(written, make):
    path = written(make())
    theirs, ours = Tokenizer.from_file(str(path)), BPETokenizer(str(path))
    for index, token in theirs.get_added_tokens_decoder().items():
        text = f"a {token.content} b{token.content}"
        (codes,) = ours.encode([text])
        assert (index in [ours.file_ids[code] for code in codes.ids_N]) == (not token.special)
        assert ours.decode([codes]) == [text]


def test_a_special_token_that_merges_could_make_is_not_made(written):
    state = _gpt()
    assert len(BPETokenizer(str(written(state))).encode(["en"])[0]) == 1
    state["added_tokens"].append(_added("en", state["model"]["vocab"]["en"], special=True))
    state["model"]["ignore_merges"] = True
    ours = BPETokenizer(str(written(state)))
    (codes,) = ours.encode(["en"])
    assert len(codes) == 2
    assert ours.decode([codes]) == ["en"]


def test_where_words_have_no_spelling_special_ones_have_no_code(written):
    words = BPETokenizer(str(written(_words())))
    for word in ("[CLS]", "[UNK]"):
        with pytest.raises(ItemError, match=r"has '\[' at character 4, "):
            words.encode([f"the {word}"])
    ours = BPETokenizer(str(written(_bert())))
    assert ours.decode(ours.encode(["[CLS] seven"])) == ["[ cls ] seven"]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(text=st.text())
def test_files_with_bytes_give_every_text_back(written, text):
    gpt, llama = BPETokenizer(str(written(_gpt()))), BPETokenizer(str(written(_llama())))
    assert gpt.decode(gpt.encode([text])) == [text]
    assert llama.decode(llama.encode([text])) == [text.replace("▁", " ")]


@pytest.mark.parametrize(
    ("make", "text", "back"),
    [
        (_qwen, "e\u0301 Å", "é Å"),
        (_prefix_space, "seven", " seven"),
        (_unigram, "the ﬁrst", "the first"),
        (_bert, "The  SÉVEN, twice and over", "the seven, twice and over"),
        (_unigram_bytes, "你 seven", "你 seven"),
    ],
)
def test_files_that_change_text_do_so_as_they_say(written, make, text, back):
    ours = BPETokenizer(str(written(make())))
    assert ours.decode(ours.encode([text])) == [back]
    assert ours.decode(ours.encode([back])) == [back]


@pytest.mark.parametrize(
    ("make", "text", "piece", "place"),
    [
        (_unigram, "seven 你好", "你", 6),
        (_bert, "two sev你en", "你", 7),
        (_bert, "two " + "x" * 300, "x" * 40, 4),
        (_bert, "🙂", "🙂", 0),
        (_words, "the digit eight", "e", 10),
        (_bases, "ACGU", "U", 3),
    ],
)
def test_a_character_without_a_code_is_named(written, make, text, piece, place):
    path = written(make())
    with pytest.raises(ItemError) as caught:
        BPETokenizer(str(path)).encode(["the", text] if make is not _bases else ["A", text])
    assert f"has {piece!r} at character {place}, for which {path} has no code" in str(caught.value)


@pytest.mark.parametrize("make", [_gpt, _llama, _unigram_bytes, _bert], ids=lambda make: make.__name__[1:])
def test_bad_empty_and_huge_items(written, make):
    ours = BPETokenizer(str(written(make())))
    for item in ("half \ud83d", 7, None, b"seven", ["seven"]):
        with pytest.raises(ItemError, match=r"surrogate pair at character 5|must be a string"):
            ours.encode([item])
    (empty, huge) = ours.encode(["", "seven " * 20_000 + "seven"])
    assert len(empty) == 0
    assert ours.decode([empty, huge]) == ["", "seven " * 20_000 + "seven"]


def test_saving_keeps_the_file(path, tmp_path):
    BPETokenizer(str(path)).save(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").read_bytes() == path.read_bytes()


def test_yaml_can_name_a_file(written):
    built = plugins.build({"text": {"plugin": "bpe", "file": str(written(_llama()))}})
    assert built["text"].decode(built["text"].encode(["seven"])) == ["seven"]


def _without_bytes(*missing):
    def change(state):
        for byte in missing:
            state["model"]["vocab"][f"no byte {byte}"] = state["model"]["vocab"].pop(spell_byte(byte))

    return change


def test_bytes_that_no_text_has_may_lack_a_piece(written):
    state = _gpt()
    state["model"]["merges"] = []
    _without_bytes(0xC0, 0xFF)(state)
    ours = BPETokenizer(str(written(state)))
    assert ours.decode(ours.encode(["é你🙂\x00"])) == ["é你🙂\x00"]


def _rename(state, token):
    state["model"]["vocab"]["renamed"] = state["model"]["vocab"].pop(token)
    state["added_tokens"] = []


_PANICS = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}  # the library stops with a panic, no exception


def _only_special(state):
    state["model"]["vocab"] = {"[UNK]": 0, "[CLS]": 1}


@pytest.mark.parametrize(
    ("make", "change", "fault"),
    [
        (_gpt, _without_bytes(0x0A), "lacks 1 of the 243 bytes of UTF-8 text, first 'Ċ' for byte 0x0A"),
        (_llama, lambda state: _rename(state, "<0x0A>"), "lacks 1 of the 243 .* '<0x0A>' for byte 0x0A"),
        (_unigram, lambda state: state["model"].update(byte_fallback=True), "lacks 243 of the 243 bytes .*'<0x00>'"),
        (_llama, lambda state: _rename(state, "<unk>"), "unknown token '<unk>' is not in the vocabulary"),
        (_bert, lambda state: _rename(state, "[UNK]"), r"unknown token '\[UNK\]' is not in the vocabulary"),
        (_words, lambda state: _rename(state, "[UNK]"), r"unknown token '\[UNK\]' is not in the vocabulary"),
        (_unigram, lambda state: state["model"].update(unk_id=999), "damaged"),
        (_words, _only_special, "has no tokens, or only special tokens"),
        (_gpt, lambda state: state["model"].update(dropout=0.1), "uses dropout, which makes encoding random"),
        (_gpt, lambda state: state["model"]["merges"].append(["no", "such pair"]), "damaged"),
        (_gpt, lambda state: state.pop("model"), "damaged"),
        (_gpt, lambda state: state["model"]["vocab"].update({"é": 7}), "tokens .* have the same id 7"),
        (_words, lambda state: state["model"]["vocab"].update({"x": 2**32 - 1}), "'x' has id 4294967295, but there"),
        (_bert, lambda state: state.update(normalizer=_PANICS), "damaged"),
        (_gpt, lambda state: state.update(decoder=None), "does not read what it writes: 'seven' came back as"),
        (_gpt, lambda state: state["added_tokens"].append(_added("é", 305, special=False)), "added token 'é'"),
    ],
)
def test_a_file_with_a_fault_is_refused(written, make, change, fault):
    state = make()
    change(state)
    path = written(state)
    with pytest.raises(ValueError, match=fault) as caught:
        BPETokenizer(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "damaged or not a Hugging Face tokenizer.json"),
        (json.dumps(_gpt()).encode()[:2000], "damaged or not a Hugging Face tokenizer.json"),
        (b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02\xff", "is not UTF-8 text"),
        (b'{"tokenizer_class": "LlamaTokenizer"}', r"AutoTokenizer\.from_pretrained"),
        (b'{"a": 0, "b": 1}', "damaged or not a Hugging Face tokenizer.json"),
        (b"[1, 2]", "damaged or not a Hugging Face tokenizer.json"),
        (b'{"normalizer":' * 100_000, "damaged or not a Hugging Face tokenizer.json"),
    ],
    ids=["empty", "truncated", "sentencepiece", "config", "vocabulary", "list", "nested"],
)
def test_what_is_no_tokenizer_json_is_refused(tmp_path, content, fault):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=fault) as caught:
        BPETokenizer.load(tmp_path)
    assert str(path) in str(caught.value)
    with pytest.raises(ValueError, match=r"is a folder\. Give the tokenizer\.json in it"):
        BPETokenizer(str(tmp_path))
    with pytest.raises(ValueError, match=r"missing\.json does not exist"):
        BPETokenizer(str(tmp_path / "missing.json"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is a pipe or a device"):
        BPETokenizer(str(tmp_path / "pipe"))


def _lighter(state):
    state["model"]["vocab"][-1][1] -= 1.0


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (_gpt, lambda state: state.update(normalizer={"type": "NFC"})),
        (_gpt, lambda state: state["model"]["merges"].pop()),
        (_gpt, lambda state: state["model"].update(ignore_merges=True)),
        (_gpt, lambda state: state["added_tokens"].pop(1)),
        (_gpt, lambda state: state["added_tokens"][1].update(lstrip=True)),
        (_unigram, _lighter),
        (_unigram, lambda state: state["normalizer"].update(type="NFC")),
        (_bert, lambda state: state["decoder"].update(cleanup=False)),
    ],
)
def test_whatever_changes_codes_or_text_changes_the_fingerprint(written, make, change):
    state = make()
    fingerprint = BPETokenizer(str(written(state))).fingerprint
    state["post_processor"] = state["padding"] = None  # neither of which is used
    assert BPETokenizer(str(written(state))).fingerprint == fingerprint
    change(state)
    assert BPETokenizer(str(written(state))).fingerprint != fingerprint
