"""Finding plugins by entry point, and the conformance suite against tokenizers that break one promise each."""

import hashlib
import importlib
import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from multidiff import plugins
from multidiff.cli import main
from multidiff.testing import check_tokenizer
from multidiff.tokenizer import Codes, ItemError, ModalityTokenizer


class Steps(ModalityTokenizer):
    """A walk: a list of floats in [0, 1], each coded as its tenth (level 0) and the hundredth within (level 1)."""

    modality = "walk"
    codebook_sizes = (10, 11)
    variable_length = True

    def __init__(self, scale: float = 1.0):
        self.scale = torch.nn.Parameter(torch.tensor(scale))

    @torch.no_grad()
    def encode(self, items):
        return [self.one(item) for item in items]

    def one(self, item):
        if not isinstance(item, list):
            raise ItemError(f"a walk is a list of floats, not {item!r}")
        codes = self.canvas(steps=len(item))
        hundredths = (torch.tensor(item, dtype=torch.float64) * self.scale * 100).round().long()
        tenths = (hundredths // 10).clamp(max=9)
        codes.ids_N = torch.stack([tenths, hundredths - 10 * tenths], dim=1).flatten()
        return codes

    @torch.no_grad()
    def decode(self, codes):
        return [self.walk(one.ids_N.view(-1, 2)) for one in codes]

    def walk(self, pairs):
        return ((pairs[:, 0] * 10 + pairs[:, 1]).clamp(max=100) / (100 * self.scale)).tolist()

    def canvas(self, steps=4):
        if steps < 0:
            raise ValueError("a walk has at least 0 steps")
        step, level = torch.arange(steps).repeat_interleave(2), torch.arange(2).repeat(steps)
        coords = torch.stack([step, level, torch.zeros_like(step)], dim=1)
        return Codes(torch.zeros_like(step), level, coords, {"steps": steps})

    def read(self, value, folder):
        path = folder / value
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ItemError(f"{path} is no walk: {error}") from None

    def write(self, item, stem):
        path = stem.with_name(stem.name + ".json")
        path.write_text(json.dumps(item))
        return path

    def preview(self, item):
        return Image.new("L", (len(item) + 1, 8))

    def examples(self):
        return [[], [0.0, 1.0], [0.25, 0.5, 0.99]]

    @property
    def fingerprint(self):
        return hashlib.sha256(str(self.scale.item()).encode()).hexdigest()

    def save(self, folder):
        (folder / "steps.json").write_text(json.dumps({"scale": self.scale.item()}))

    @classmethod
    def load(cls, folder):
        path = folder / "steps.json"
        try:
            return cls(json.loads(path.read_text())["scale"])
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is no walk tokenizer: {error}") from None


class Pairs(Steps):
    """Walks of two steps only: a tokenizer of one size."""

    variable_length = False

    def one(self, item):
        if not isinstance(item, list) or len(item) != 2:
            raise ItemError(f"a walk of two steps is wanted, not {item!r}")
        return super().one(item)

    def canvas(self, steps=2):
        if steps != 2:
            raise ValueError("only walks of 2 steps fit")
        return super().canvas(2)

    def examples(self):
        return [[0.0, 1.0], [0.25, 0.5]]


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


@breaks("ItemError for what is no item")
class AcceptsAnything(Steps):
    def one(self, item):
        return super().one(item if isinstance(item, list) else [])


@breaks("ItemError for what is no item")
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


@breaks("some usual size")
class CanvasNeedsSize(Steps):
    def canvas(self, steps=0):
        return super().canvas(steps)


@breaks("must raise ValueError")
class AnySize(Steps):
    def canvas(self, steps=4):
        return super().canvas(max(0, steps))


@breaks("levels and coordinates of such an item")
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


@breaks("levels and coordinates of such an item")
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


@breaks("must give a PIL image")
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


@breaks("none of which can hold a program")
class Pickles(Steps):
    def save(self, folder):
        super().save(folder)
        torch.save({}, folder / "weights.pt")


@breaks("wrote no file")
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


# Entry points


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a distribution with one module and the entry points that are given, as pip would lay it out."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(distribution: str, entry_points: dict[str, str], module: str = "", code: str = "") -> None:
        info = Path(tmp_path, f"{distribution}-1.2.dist-info")
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        lines = [f"{name} = {value}" for name, value in entry_points.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{plugins.GROUP}]", *lines]) + "\n")
        if module:
            Path(tmp_path, f"{module}.py").write_text(code)
            monkeypatch.delitem(sys.modules, module, raising=False)

    return install


SUBCLASS = "import test_plugins\nclass Walks(test_plugins.Steps): pass\n"


@pytest.fixture
def walks(install, monkeypatch):
    monkeypatch.setitem(sys.modules, "test_plugins", sys.modules[__name__])
    install("walking", {"walks": "walking_plugin:Walks"}, "walking_plugin", SUBCLASS)


def test_first_party_tokenizers_come_through_the_same_door():
    found = plugins.installed()
    assert {"bpe", "codec", "encodec", "vq"} <= set(found)
    assert list(found) == sorted(found)
    assert found["bpe"].value == "multidiff_bpe:BPETokenizer"
    assert plugins.load("bpe").modality == "text"


def test_a_class_that_a_plugin_exports_from_another_package_has_a_name(install):
    install("lending", {"lent": "lender:Lent"}, "lender", "from owner import Lent\n")
    install("broken", {"broken": "no_such_module:Lent"}, "owner", SUBCLASS.replace("Walks", "Lent"))
    assert plugins.name_of(plugins.load("lent")()) == "lent"


def test_what_a_plugin_refuses_is_a_sentence_without_a_traceback(install, monkeypatch):
    install("refusing", {"walks": "tide:Walks"}, "tide", "def refuse(error):\n    raise error\n")
    refuse = importlib.import_module("tide").refuse

    def here(error):
        raise error

    for raises, error in ((refuse, ValueError("too steep")), (here, ItemError("too steep"))):
        monkeypatch.setattr("multidiff.cli.plugins.main", lambda raises=raises, error=error: raises(error))
        with pytest.raises(SystemExit, match=r"^multidiff: too steep$"):
            main(["plugins"])
    monkeypatch.setattr("multidiff.cli.plugins.main", lambda: here(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        main(["plugins"])


def test_an_installed_plugin_is_found_built_and_named(walks, tmp_path):
    assert "walks" in plugins.installed()
    assert "walking_plugin" not in sys.modules, "looking must not import"
    built = plugins.build({"path": {"plugin": "walks", "scale": 0.5}, "words": {"plugin": "bpe"}})
    assert list(built) == ["path", "words"]
    assert isinstance(built["path"], Steps)
    assert built["path"].scale.item() == 0.5
    assert plugins.name_of(built["path"]) == "walks"
    assert plugins.name_of(built["words"]) == "bpe"

    built["path"].save(tmp_path)
    again = plugins.build({"other": {"plugin": "walks", "folder": str(tmp_path)}})
    assert again["other"].fingerprint == built["path"].fingerprint


def test_a_name_that_two_plugins_claim_is_an_error(walks, install):
    install("running", {"walks": "running:Walks"})
    with pytest.raises(ValueError, match="two plugins are called 'walks'") as caught:
        plugins.installed()
    assert "walking_plugin:Walks of walking 1.2" in str(caught.value)
    assert "running:Walks of running 1.2" in str(caught.value)


def test_an_unknown_name_is_answered_with_the_nearest(walks):
    with pytest.raises(ValueError, match=r"no tokenizer plugin is called 'walk'; did you mean 'walks'\?"):
        plugins.load("walk")
    with pytest.raises(ValueError, match=r"'zzzz'; installed: bpe, .*walks"):
        plugins.load("zzzz")


def test_a_plugin_that_does_not_import_is_named_with_the_reason(install):
    install("broken", {"broken": "broken_plugin:Broken"}, "broken_plugin", "import a_module_nobody_has\n")
    with pytest.raises(ImportError, match=r"plugin 'broken' \(.* of broken 1.2\).*a_module_nobody_has"):
        plugins.load("broken")


def test_an_entry_point_must_be_a_tokenizer(install):
    install("foreign", {"foreign": "foreign_plugin:Thing"}, "foreign_plugin", "class Thing: pass\n")
    with pytest.raises(ValueError, match=r"plugin 'foreign' .* is not a multidiff.ModalityTokenizer"):
        plugins.load("foreign")


def test_a_survey_tries_every_plugin_by_itself(walks, install, capsys):
    install("broken", {"broken": "broken_plugin:Broken"}, "broken_plugin", "import a_module_nobody_has\n")
    install("leaving", {"leaving": "leaving_plugin:Gone"}, "leaving_plugin", "raise SystemExit('no licence')\n")
    needs = SUBCLASS + "class Needs(Walks):\n    def __init__(self, path): pass\n"
    install("needing", {"needs": "needing_plugin:Needs"}, "needing_plugin", needs)
    half = (
        "from multidiff import ModalityTokenizer\nclass Half(ModalityTokenizer):\n    def encode(self, items): pass\n"
    )
    install("abstract", {"half": "abstract_plugin:Half"}, "abstract_plugin", half)
    install("running", {"walks": "running:Walks"})
    found = {(report.name, report.package): report for report in plugins.survey()}
    assert "no module named" in found["broken", "broken"].problem.lower()
    assert "no licence" in found["leaving", "leaving"].problem
    assert found["needs", "needing"] == plugins.Report("needs", "needing", "1.2", "walk")
    assert "running:Walks of running 1.2 has the same name" in found["walks", "walking"].problem
    assert "abstract_plugin:Half of abstract 1.2) is abstract: it does not have canvas, decode" in (
        found["half", "abstract"].problem
    )
    assert next(report for report in found.values() if report.name == "bpe").problem is None
    with pytest.raises(SystemExit) as stopped:
        main(["plugins"])
    assert stopped.value.code == 1
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["broken"].split()[1:4] == ["?", "broken", "1.2"]
    assert "does not import" in lines["broken"]
    assert lines["half"].split()[1:4] == ["?", "abstract", "1.2"]
    assert lines["needs"].split()[1:] == ["walk", "needing", "1.2", "works"]


def test_a_class_without_an_entry_point_has_no_name():
    with pytest.raises(ValueError, match="Steps is not installed as a plugin"):
        plugins.name_of(Steps())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "'path' names no plugin"),
        ({"plugin": "walks", "folder": "x", "scale": 2.0}, "'path': `folder` holds all its settings; remove scale"),
        ({"plugin": "walks", "sclae": 2.0}, r"'path' \(plugin 'walks'\): .*sclae"),
    ],
)
def test_a_bad_configuration_names_the_tokenizer(walks, spec, message):
    with pytest.raises(ValueError, match=message):
        plugins.build({"path": spec})
