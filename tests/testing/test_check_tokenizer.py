"""The conformance suite, against tokenizers that break one promise each."""

import hashlib
import json
import random
import time

import numpy as np
import pytest
import torch
from PIL import Image

from multidiff.testing import check_tokenizer
from multidiff.tokenizer import ItemError
from tests.helpers.walks import Pairs, Steps


@pytest.mark.parametrize("cls", [Steps, Pairs])
def test_a_correct_tokenizer_passes(cls, tmp_path, capsys):
    check_tokenizer(cls(), tmp_path)
    printed = capsys.readouterr().out
    assert f"{cls.__name__}: walk, 10 + 11 codes" in printed
    assert "items are written as .json; saved: steps.json (14 bytes)\n  keeps the contract" in printed
    check_tokenizer(cls())


def test_the_suite_leaves_the_random_state_as_it_was():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    check_tokenizer(Steps())
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


BROKEN: list[tuple[type[Steps], str]] = []


def breaks(message):
    """Marks a tokenizer that breaks one promise, with what the suite must say of it."""

    def mark(cls):
        BROKEN.append((cls, message))
        return cls

    return mark


# Attributes


@breaks("codebook_sizes must be a tuple")
class ListOfSizes(Steps):
    codebook_sizes = [10, 11]  # noqa: RUF012 - the fault to find


@breaks("modality must be a word")
class NoModality(Steps):
    modality = ""


@breaks("codebook_sizes must be positive ints")
class FloatSize(Steps):
    codebook_sizes = (10, 11.0)


@breaks("variable_length must be True or False")
class VagueLength(Steps):
    variable_length = None


@breaks("hex digest")
class NotHex(Steps):
    fingerprint = "version 1"


@breaks("fingerprint must be the same")
class RestlessFingerprint(Steps):
    fingerprint = property(lambda self: hashlib.sha256(str(random.random()).encode()).hexdigest())


@breaks("must return the tokenizer itself")
class ToNothing(Steps):
    def to(self, device):
        return None


# Encoding


@breaks("at least one item")
class NoExamples(Steps):
    def examples(self):
        return []


@breaks("ids_N must lie in")
class SmallCodebook(Steps):
    codebook_sizes = (9, 11)


@breaks("levels_N must lie in")
class OneLevelOnly(Steps):
    codebook_sizes = (10,)


@breaks("ids_N must be an int64 tensor")
class Int32(Steps):
    def one(self, item):
        codes = super().one(item)
        codes.ids_N = codes.ids_N.int()
        return codes


@breaks("coords_N3 must be")
class FlatCoordinates(Steps):
    def canvas(self, steps=4):
        codes = super().canvas(steps)
        codes.coords_N3 = codes.coords_N3[:, :2]
        return codes


@breaks("must not be negative")
class NegativeCoordinates(Steps):
    def canvas(self, steps=4):
        codes = super().canvas(steps)
        codes.coords_N3 = codes.coords_N3 - 1
        return codes


@breaks("share a level and coordinates")
class SharedPlaces(Steps):
    def canvas(self, steps=4):
        codes = super().canvas(steps)
        codes.coords_N3 = torch.zeros_like(codes.coords_N3)
        return codes


@breaks("must have one entry")
class TwoSizes(Steps):
    def canvas(self, steps=4, levels=2):
        codes = super().canvas(steps)
        codes.size["levels"] = levels
        return codes


@breaks("size must map str to int")
class TensorSize(Steps):
    def canvas(self, steps=4):
        codes = super().canvas(int(steps))
        codes.size = {"steps": torch.tensor(int(steps))}
        return codes


@breaks(r"must be \[\]")
class NoneForEmpty(Steps):
    def encode(self, items):
        return super().encode(items) if items else None


@breaks("one Codes per item")
class DropsItems(Steps):
    def encode(self, items):
        return super().encode(items)[:2]


@breaks("deterministic")
class RandomCodes(Steps):
    def encode(self, items):
        with torch.random.fork_rng():
            codes = super().encode(items)
            for one in codes:
                one.ids_N = torch.randint(10, one.ids_N.shape)
        return codes


@breaks("an item alone and in a batch")
class DependsOnBatchSize(Steps):
    def encode(self, items):
        codes = super().encode(items)
        for one in codes:
            one.ids_N = (one.ids_N + len(items)) % 10
        return codes


@breaks("an item alone and in a batch")
class DependsOnNeighbour(Steps):
    def encode(self, items):
        codes = super().encode(items)
        for one, before in zip(codes[1:], codes, strict=False):
            one.ids_N = (one.ids_N + len(before)) % 10
        return codes


@breaks("the order of the batch")
class DependsOnOrder(Steps):
    def encode(self, items):
        codes = super().encode(items)
        return codes[::-1] if len(items) > 1 and len(items[0]) > len(items[-1]) else codes


@breaks(r"encode\(\) changed the global random state")
class SeedsTorch(Steps):
    def encode(self, items):
        torch.manual_seed(1234)
        return super().encode(items)


@breaks(r"decode\(\) changed the global random state")
class DrawsFromNumpy(Steps):
    def decode(self, codes):
        np.random.rand()  # noqa: NPY002 - the fault to find
        return super().decode(codes)


@breaks(r"preview\(\) changed the global random state")
class DrawsFromRandom(Steps):
    def preview(self, item):
        random.random()
        return super().preview(item)


@breaks("must not record gradients")
class RecordsGradient(Steps):
    def encode(self, items):
        with torch.enable_grad():
            _ = self.scale * torch.randn(3, generator=torch.Generator()).requires_grad_() * self.scale
        return super().encode(items)


@breaks("switched gradients off")
class SwitchesGradientOff(Steps):
    def decode(self, codes):
        torch.set_grad_enabled(False)
        return super().decode(codes)


@breaks("ItemError for an object that is not an item")
class AcceptsAnything(Steps):
    def one(self, item):
        return super().one(item if isinstance(item, list) else [])


@breaks("ItemError for an object that is not an item")
class TypeErrorForForeign(Steps):
    def one(self, item):
        if not isinstance(item, list):
            raise TypeError("no walk")
        return super().one(item)


@breaks("changed an item")
class ChangesItsInput(Steps):
    def encode(self, items):
        codes = super().encode(items)
        for item in items:
            if isinstance(item, list):
                item.sort(reverse=True)
        return codes


# Canvases


@breaks("must have a usual size")
class CanvasNeedsSize(Steps):
    def canvas(self, steps=0):
        return super().canvas(steps)


@breaks("must raise ValueError")
class AnySize(Steps):
    def canvas(self, steps=4):
        return super().canvas(max(0, steps))


@breaks("levels and coordinates of an item of that size")
class OtherLevels(Steps):
    def one(self, item):
        codes = super().one(item)
        codes.levels_N, codes.ids_N = codes.levels_N.flip(0), codes.ids_N.flip(0)
        return codes


@breaks("must all be 0")
class FilledCanvas(Steps):
    def canvas(self, steps=4):
        codes = super().canvas(steps)
        codes.ids_N = codes.ids_N + 1
        return codes


@breaks("levels and coordinates of an item of that size")
class LiesAboutSize(Steps):
    def one(self, item):
        codes = super().one(item)
        codes.size = {"steps": len(item) + 1}
        return codes


@breaks("same number of codes")
class RoundsUp(Steps):
    def canvas(self, steps=4):
        return super().canvas(steps + steps % 2 if steps > 0 else steps)

    def examples(self):
        return [[0.5, 0.25]]


@breaks("must be a prefix")
class CountsBackwards(Steps):
    def canvas(self, steps=4):
        codes = super().canvas(steps)
        codes.coords_N3[:, 0] = codes.coords_N3[:, 0].flip(0)
        return codes


@breaks("must have a code of level 0")
class NoLevelZero(Steps):
    codebook_sizes = (1, 10, 11)

    def canvas(self, steps=4):
        codes = super().canvas(steps)
        codes.levels_N = codes.levels_N + 1
        return codes


# Decoding


@breaks("one item per Codes")
class FixedAnswer(Steps):
    def decode(self, codes):
        return super().decode(codes)[:1]


@breaks("the size of its original")
class ShortWalks(Steps):
    def walk(self, pairs):
        return super().walk(pairs)[:-1]


@breaks("codes alone and in a batch")
class BatchedDecode(Steps):
    def decode(self, codes):
        return [[0.5] * len(walk) if len(codes) > 1 else walk for walk in super().decode(codes)]


@breaks(r"dimensions\(\) must be None or a number of at least 0 and a word such as 'byte', not 3")
class BareNumber(Steps):
    def dimensions(self, codes):
        return 3


@breaks(r"dimensions\(\) must have the same unit for all codes, not \['None', 'step'\]")
class UnitOfSome(Steps):
    def dimensions(self, codes):
        return (len(codes) / 2, "step") if len(codes) == 8 else None


@breaks("changed the codes that it was given")
class ClobbersCodes(Steps):
    def decode(self, codes):
        walks = super().decode(codes)
        for one in codes:
            one.ids_N.zero_()
        return walks


@breaks(r"encode\(decode\(random codes\)\): ids_N must lie in")
class TooFar(Steps):
    def walk(self, pairs):
        return [2 * value for value in super().walk(pairs)]


class NothingToDecode(Steps):
    def walk(self, pairs):
        if not len(pairs):
            raise IndexError("no pairs")
        return super().walk(pairs)

    def examples(self):
        return [[0.5]]


# Files


@breaks("plus a suffix")
class LosesTheName(Steps):
    def write(self, item, stem):
        return super().write(item, stem.with_suffix(""))


@breaks("left other files behind")
class LeavesPartsBehind(Steps):
    def write(self, item, stem):
        stem.with_name(stem.name + ".part").touch()
        return super().write(item, stem)


@breaks("must return the path of the file")
class ReturnsStem(Steps):
    def write(self, item, stem):
        super().write(item, stem)
        return stem


@breaks("bring back what write")
class ReadsNothing(Steps):
    def read(self, value, folder):
        return super().read(value, folder)[:1]


@breaks("missing or damaged file")
class ReadsAnyFile(Steps):
    def read(self, value, folder):
        try:
            return super().read(value, folder)
        except ItemError:
            return []


@breaks("missing or damaged file")
class BareOSError(Steps):
    def read(self, value, folder):
        return json.loads((folder / value).read_text())


@breaks("must return a PIL image")
class EmptyPreview(Steps):
    def preview(self, item):
        return Image.new("L", (len(item), 8))


# Extremes and threads


@breaks("size of its original: {'steps': 511} became {'steps': 510}")
class ShortensWhatIsLong(Steps):
    def walk(self, pairs):
        return super().walk(pairs[: max(20, len(pairs) - 1)])


@breaks("thread-safe")
class SharesScratch(Steps):
    def encode(self, items):
        self.scratch = items
        time.sleep(0.002)
        return super().encode(self.scratch)


# Saving


@breaks("which cannot contain code")
class Pickles(Steps):
    def save(self, folder):
        super().save(folder)
        torch.save({}, folder / "weights.pt")


@breaks(r"save\(\) must write a file")
class SavesNothing(Steps):
    def save(self, folder):
        pass

    @classmethod
    def load(cls, folder):
        return cls()


@breaks("fingerprint must survive")
class ForgetsScale(Steps):
    @classmethod
    def load(cls, folder):
        super().load(folder)
        return cls(0.5)


@breaks("empty folder must raise ValueError")
class ForgivesEmptyFolder(Steps):
    @classmethod
    def load(cls, folder):
        return super().load(folder) if (folder / "steps.json").exists() else cls()


@breaks("naming the file")
class UnnamedFile(Steps):
    @classmethod
    def load(cls, folder):
        try:
            return super().load(folder)
        except ValueError:
            raise ValueError(f"bad tokenizer in {folder}") from None


@pytest.mark.parametrize(("cls", "message"), BROKEN)
def test_a_broken_promise_is_found(cls, message, tmp_path):
    try:
        with pytest.raises(AssertionError, match=message):
            check_tokenizer(cls(), tmp_path)
    finally:
        torch.set_grad_enabled(True)


def test_what_a_plugin_raises_itself_is_shown_as_it_is():
    with pytest.raises(IndexError, match="no pairs"):
        check_tokenizer(NothingToDecode())
