"""Plugins: found by entry point, imported only when they are needed, named in every error; and new ones written."""

import importlib
import sys
from pathlib import Path

import pytest

from multidiff import plugins
from multidiff.cli import main
from multidiff.plugins import registry
from multidiff.plugins.scaffold import write_package
from multidiff.tokenizer import ItemError
from tests.helpers.walks import Steps


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


SUBCLASS = "from tests.helpers.walks import Steps\nclass Walks(Steps): pass\n"


@pytest.fixture
def walks(install):
    install("walking", {"walks": "walking_plugin:Walks"}, "walking_plugin", SUBCLASS)


def test_first_party_tokenizers_come_through_the_same_door():
    found = registry.installed()
    assert {"bpe", "codec", "encodec", "grid", "vq"} <= set(found)
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
        monkeypatch.setattr("multidiff.cli.plugins.main", lambda arguments, raises=raises, error=error: raises(error))
        with pytest.raises(SystemExit, match=r"^multidiff: too steep$"):
            main(["plugins"])
    monkeypatch.setattr("multidiff.cli.plugins.main", lambda arguments: here(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        main(["plugins"])


def test_an_installed_plugin_is_found_built_and_named(walks, tmp_path):
    assert "walks" in registry.installed()
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
    with pytest.raises(ValueError, match="Two plugins are called 'walks'") as caught:
        registry.installed()
    assert "walking_plugin:Walks of walking 1.2" in str(caught.value)
    assert "running:Walks of running 1.2" in str(caught.value)


def test_an_unknown_name_is_answered_with_the_nearest(walks):
    with pytest.raises(ValueError, match=r"There is no tokenizer plugin 'walk'. Did you mean 'walks'\?"):
        plugins.load("walk")
    with pytest.raises(ValueError, match=r"'zzzz'. The installed plugins are bpe, .*walks"):
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
    assert "abstract_plugin:Half of abstract 1.2) is abstract: it lacks canvas, decode" in (
        found["half", "abstract"].problem
    )
    assert next(report for report in found.values() if report.name == "bpe").problem is None
    with pytest.raises(SystemExit) as stopped:
        main(["plugins"])
    assert stopped.value.code == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("multidiff: These plugins do not work: broken, half, leaving, walks, walks. ")
    lines = {line.split()[0]: line for line in printed.out.splitlines()}
    assert lines["broken"].split()[1:4] == ["?", "broken", "1.2"]
    assert "cannot be imported" in lines["broken"]
    assert lines["half"].split()[1:4] == ["?", "abstract", "1.2"]
    assert lines["needs"].split()[1:] == ["walk", "needing", "1.2", "works"]


def test_a_class_without_an_entry_point_has_no_name():
    with pytest.raises(ValueError, match="Steps is not installed as a plugin"):
        plugins.name_of(Steps())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "'path' has no plugin"),
        (
            {"plugin": "walks", "folder": "x", "scale": 2.0},
            "'path': The folder already contains all settings. Remove scale",
        ),
        ({"plugin": "walks", "sclae": 2.0}, r"'path' \(plugin 'walks'\): .*sclae"),
    ],
)
def test_a_bad_configuration_names_the_tokenizer(walks, spec, message):
    with pytest.raises(ValueError, match=message):
        plugins.build({"path": spec})


@pytest.mark.parametrize("name", ["Tide", "9lives", "a-b", "class", "text", "bpe", ""])
def test_a_name_that_cannot_be_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=repr(name)):
        write_package(name, tmp_path / "made")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_left_alone(tmp_path):
    with pytest.raises(ValueError, match=r"already exists\. Choose another folder"):
        write_package("tide", tmp_path)
    assert not list(tmp_path.iterdir())
