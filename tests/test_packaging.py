"""What is shipped: the wheel in an environment of its own, a third party's plugin beside it, and the imports."""

import ast
import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from itertools import chain

import numpy as np
import pytest
from PIL import Image

from tests.helpers.paths import ROOT

EXAMPLES = {"melody": ROOT / "tests" / "plugin_example", "labelmap": ROOT / "examples" / "labelmap"}
TEMPLATE = ROOT / "multidiff" / "plugins" / "template"
SHIPPED = {
    "multidiff": ROOT / "multidiff",
    **{
        name: ROOT / "tokenizers" / name
        for name in (
            "multidiff_autoencoder",
            "multidiff_bpe",
            "multidiff_codec",
            "multidiff_encodec",
            "multidiff_grid",
            "multidiff_sound",
            "multidiff_vq",
        )
    },
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def uv(*arguments):
    """uv from its cache alone, so that tests pass without a network; with one where the cache is cold."""
    command = [sys.executable, "-m", "uv", "--quiet", *map(str, arguments)]
    if subprocess.run([*command, "--offline"], capture_output=True).returncode:
        subprocess.run(command, check=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    uv("build", "--wheel", "--out-dir", folder, ROOT)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """The `bin` of a fresh environment with the wheel, the example plugins and one made by `multidiff new-tokenizer`.

    The packages they depend on come from the environment of the tests: its folder stands behind the fresh one's on the
    path, where its .pth files, and so the checkout installed for editing, do not count.
    """
    folder = tmp_path_factory.mktemp("environment")
    bin = folder / ("Scripts" if os.name == "nt" else "bin")
    uv("venv", "--python", sys.executable, folder)
    install = ("pip", "install", "--no-deps", "--compile-bytecode", "--python", bin / "python")
    uv(*install, wheel, *EXAMPLES.values())
    (packages,) = folder.rglob("site-packages")
    (packages / "behind.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    run(bin / "multidiff", "new-tokenizer", "tide_gauge", "--output", folder / "made", cwd=folder)
    uv(*install, folder / "made")
    return bin


def run(*command, cwd):
    """Output of a command that knows nothing of the checkout."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(list(map(str, command)), cwd=cwd, env=clean, capture_output=True, text=True)
    assert not result.returncode, f"{' '.join(map(str, command))}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def test_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel):
    expected = {
        f"{name}/{file.relative_to(folder).as_posix()}"
        for name, folder in SHIPPED.items()
        for file in folder.rglob("*")
        if file.is_file() and file.suffix != ".pyc"
    } | {f"multidiff/{file.relative_to(ROOT).as_posix()}" for file in (ROOT / "configs").rglob("*.yaml")}
    with zipfile.ZipFile(wheel) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        (entry_points,) = (name for name in sizes if name.endswith("dist-info/entry_points.txt"))
        declared = archive.read(entry_points).decode()
    inside = {name for name in sizes if ".dist-info/" not in name}
    assert inside == expected
    assert any(name.endswith("licenses/LICENSE") for name in sizes)
    for name, value in PROJECT["entry-points"]["multidiff.tokenizers"].items():
        assert f"{name} = {value}" in declared
    weights = {name: size for name, size in sizes.items() if name.endswith(".safetensors")}
    assert sum(weights.values()) < 12e6, weights


IMPORT_ALL = """
import importlib, pkgutil, sys
folder, *names = sys.argv[1:]
count = 0
for name in names:
    package = importlib.import_module(name)
    assert package.__file__.startswith(folder), package.__file__
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
        count += 1
print(count)
"""


def test_every_module_imports_from_the_wheel(environment, tmp_path):
    output = run(environment / "python", "-c", IMPORT_ALL, environment.parent, *SHIPPED, cwd=tmp_path)
    modules = [file for folder in SHIPPED.values() for file in folder.rglob("*.py") if TEMPLATE not in file.parents]
    assert int(output) == len(modules) - len(SHIPPED)


def test_plugins_pass_their_own_tests_where_they_are_installed(environment, tmp_path):
    made = {"tide_gauge": environment.parent / "made"}
    for name, folder in {**EXAMPLES, **made}.items():
        (tmp_path / f"test_{name}.py").write_bytes((folder / f"test_{name}.py").read_bytes())
    assert "20 passed" in run(environment / "python", "-m", "pytest", "-q", cwd=tmp_path)
    listed = run(environment / "multidiff", "plugins", cwd=tmp_path)
    for line in (
        "melody +melody +multidiff-melody +0.1.0 +works",
        "labelmap +class map +multidiff-labelmap +0.1.0 +works",
        "tide_gauge +tide_gauge +multidiff-tide_gauge +0.1.0 +works",
    ):
        assert re.search(f"^{line}$", listed, re.M)


def test_configurations_are_found_by_name_where_the_wheel_is_installed(environment, tmp_path):
    configs = ("--config", "digits", "--config", "model/small")
    printed = run(environment / "multidiff", "fit", *configs, "--print_config", cwd=tmp_path)
    assert "source: runs/digits/data" in printed
    assert "hidden_size: 768" in printed


def test_what_is_installed_beside_the_command_is_named_as_it_is_published():
    for folder in (*EXAMPLES.values(), TEMPLATE):
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert PROJECT["name"] in project["dependencies"]
    extras = "|".join(PROJECT["optional-dependencies"])
    for file in chain(*((ROOT / name).rglob("*.py") for name in ("multidiff", "tokenizers", "demo", "scripts"))):
        for name in re.findall(rf"([\w-]+)\[(?:{extras})\]", file.read_text(encoding="utf-8")):
            assert name == PROJECT["name"], file


def test_examples_are_short():
    for folder in (*EXAMPLES.values(), TEMPLATE):
        (module,) = folder.glob("*/__init__.py")
        assert len(module.read_text(encoding="utf-8").splitlines()) < 120


def test_tokenizers_is_still_hugging_faces():
    assert not (ROOT / "tokenizers" / "__init__.py").exists()
    code = "import tokenizers; print(tokenizers.__file__, tokenizers.Tokenizer)"
    output = run(sys.executable, "-c", code, cwd=ROOT)
    assert str(ROOT / "tokenizers") not in output


def test_importing_multidiff_imports_nothing_heavy():
    code = (
        "import multidiff, multidiff.cli, sys; print({'torch', 'lightning', 'diffusers', 'numpy'} & set(sys.modules))"
    )
    assert run(sys.executable, "-c", code, cwd=ROOT).strip() == "set()"


def imports(folder):
    """(file, name of the top-level package) of every import in a folder, those inside functions included."""
    for file in folder.rglob("*.py"):
        if TEMPLATE in file.parents and folder != TEMPLATE:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            for name in names:
                yield file, name.split(".")[0]


def normal(requirement):
    """The distribution of a requirement such as `Jsonargparse[signatures]>=4`, spelled as PyPA's specification says."""
    (name,) = re.findall(r"^[\w.-]+", requirement)
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("multidiff", ["evaluate", "lm-eval"]),
        ("multidiff/plugins/template", ["dev"]),
        ("tokenizers", ["quantizers"]),
        ("examples", ["dev"]),
        ("demo", ["demo"]),
        ("scripts", ["demo", "evaluate"]),
        ("tests", ["demo", "dev", "lm-eval"]),
    ],
)
def test_nothing_is_imported_that_is_not_declared(folder, extras):
    declared = {*PROJECT["dependencies"]}
    for extra in extras:
        declared.update(PROJECT["optional-dependencies"][extra])
    allowed = {normal(requirement) for requirement in declared}
    providers = packages_distributions()
    plugins = {"multidiff_melody", "multidiff_labelmap", "multidiff_series"}
    own = {"benchmarks", "demo", "scripts", "tests", *plugins, *SHIPPED}
    undeclared = {
        f"{file.relative_to(ROOT)}: {name}"
        for file, name in imports(ROOT / folder)
        if name not in sys.stdlib_module_names
        and name not in own
        and not allowed & set(map(normal, providers.get(name, [name])))  # of an extra that is not installed
    }
    assert not undeclared


def test_only_the_encodec_plugin_needs_the_package_that_is_not_free_for_commerce():
    for name in ("multidiff_autoencoder", "multidiff_codec", "multidiff_sound"):
        used = {imported for _, imported in imports(ROOT / "tokenizers" / name)}
        assert not used & {"encodec", "multidiff_encodec"}


def test_lock_pins_every_dependency_and_records_no_address():
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert "://" not in lock
    assert not re.search(r"^-", lock, re.M), "no option, and so no index, belongs into the lock"
    pinned = {normal(name) for name in re.findall(r"^([\w.-]+)==", lock, re.M)}
    extras = PROJECT["optional-dependencies"]
    required = {normal(requirement) for requirement in [*PROJECT["dependencies"], *chain(*extras.values())]}
    assert required <= pinned


TRAINING = """
model:
  class_path: multidiff.training.MaskedDiffusionModule
  init_args:
    tokenizers:
      text: {plugin: bpe}
      tune: {plugin: melody, longest: 4}
      map: {plugin: labelmap, classes: 3}
      tide: {plugin: tide_gauge}
    transformer: {hidden_size: 16, num_layers: 1, num_heads: 2}
data:
  class_path: multidiff.data.module.DocumentDataModule
  init_args: {source: data, tokenizers: "${model.init_args.tokenizers}", batch_size: 2}
trainer:
  max_steps: 2
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  callbacks:
    - class_path: multidiff.training.SaveModel
      init_args: {folder: model}
"""


def test_plugins_train_and_generate_where_they_are_installed(environment, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    documents = []
    for number, split in enumerate(["train", "train", "train", "train", "validation"]):
        (data / f"{number}.json").write_text(json.dumps([[60 + number, 1], [64, 2 + number % 2]]), encoding="utf-8")
        Image.new("L", (8, 4), number % 3).save(data / f"{number}.png")
        (data / f"{number}.csv").write_text("0\n0.5\n-0.5\n", encoding="utf-8")
        parts = [{"text": f"tune {number}"}, {"tune": f"{number}.json"}, {"map": f"{number}.png"}]
        documents.append({"split": split, "segments": [*parts, {"tide": f"{number}.csv"}]})
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, documents)), encoding="utf-8")
    (tmp_path / "training.yaml").write_text(TRAINING, encoding="utf-8")

    run(environment / "multidiff", "fit", "--config", "training.yaml", cwd=tmp_path)
    assert (tmp_path / "model" / "tokenizers" / "tune" / "melody.json").is_file()

    generate = [environment / "multidiff", "generate", "--model", "model", "--steps", "2", "--output", "out"]
    fill = [
        "--fill",
        "tune:notes=5",
        "--fill",
        "map:height=8,width=4",
        "--fill",
        "tide:samples=6",
        "--num-samples",
        "2",
    ]
    printed = run(*generate, "--given", "text=up", *fill, cwd=tmp_path).split()
    assert sorted(printed) == [f"out/{name}" for name in sorted(NAMES)]
    for number in range(2):
        tune = json.loads((tmp_path / f"out/tune-00{number}.json").read_text(encoding="utf-8"))
        assert len(tune) <= 5
        assert all(0 <= pitch < 128 and 1 <= duration <= 4 for pitch, duration in tune)
        with Image.open(tmp_path / f"out/map-00{number}.png") as picture:
            assert (picture.size, np.asarray(picture).max() < 3) == ((4, 8), True)
        assert len((tmp_path / f"out/tide-00{number}.csv").read_text(encoding="utf-8").split()) <= 6


NAMES = [f"{stem}-00{number}.{suffix}" for stem, suffix in (("tune", "json"), ("map", "png"), ("tide", "csv"))
         for number in range(2)]  # fmt: skip


def test_the_template_trains_as_it_stands(environment, tmp_path):
    made = environment.parent / "made"
    (tmp_path / "data").mkdir()
    lines = []
    for number, split in enumerate(("train", "train", "validation")):
        (tmp_path / "data" / f"{number}.csv").write_text("0\n0.5\n", encoding="utf-8")
        lines.append(json.dumps({"split": split, "segments": [{"text": "up"}, {"tide_gauge": f"{number}.csv"}]}))
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    short = ["--trainer.max_steps", "1", "--trainer.accelerator", "cpu", "--data.init_args.batch_size", "2"]
    run(environment / "multidiff", "fit", "--config", made / "training.yaml", *short, cwd=tmp_path)
    model = tmp_path / "runs" / "tide_gauge" / "model"
    assert (model / "tokenizers" / "tide_gauge" / "tide_gauge.json").is_file()
