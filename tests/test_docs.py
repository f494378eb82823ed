"""The documentation builds without a broken link or reference, and what it shows is true.

Code blocks are tried as far as that takes no model: examples run, imports resolve, tasks and sampler settings are
valid, data are read, and commands, configurations and options exist.
"""

import ast
import doctest
import inspect
import os
import re
import subprocess
import sys
from functools import cache
from importlib import import_module, util
from pathlib import Path
from textwrap import dedent

import pytest
import yaml
from lightning.pytorch import Trainer

import multidiff
from multidiff import MaskSampler
from multidiff.checkpoints import load_sampler
from multidiff.cli import configuration
from multidiff.data import read_metadata
from multidiff.objectives import Task
from tests.helpers.paths import ROOT

PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("*.md"))]
PACKAGES = [ROOT / "multidiff", *sorted((ROOT / "tokenizers").glob("multidiff_*"))]


def blocks(language):
    """(page, code) of every fenced block in this language, as parameters of a test."""
    found = []
    for page in PAGES:
        fence = rf"^( *)```{language}\n(.*?)^\1```$"
        for number, match in enumerate(re.finditer(fence, page.read_text(encoding="utf-8"), re.M | re.S)):
            found.append(pytest.param(dedent(match[2]), id=f"{page.relative_to(ROOT)}-{number}"))
    assert found, f"no page has a block of {language}"
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built documentation. A builder that fetched something would meet a proxy that does not exist, and fail.

    Without `--quiet`, with which MkDocs counts no warnings.
    """
    folder = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert not result.returncode, result.stdout + result.stderr
    return folder


def test_site_loads_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        tags = re.findall(r"<(?:script|img|iframe|link)\b[^>]*>", page.read_text(encoding="utf-8"))
        assert not [tag for tag in tags if re.search(r"""(src|href)=["']?(https?:)?//""", tag)], page
    for style in site.rglob("*.css"):
        assert not re.search(r"""(url\(|@import)\s*["']?(https?:)?//""", style.read_text(encoding="utf-8")), style


@pytest.mark.parametrize("name", multidiff.__all__)
def test_every_public_name_is_in_the_reference(site, name):
    home = f"multidiff.{multidiff._HOME[name]}.{name}"
    assert any(f'id="{home}"' in page.read_text(encoding="utf-8") for page in (site / "api").glob("*.html"))


def test_examples_of_docstrings_are_shown_as_code(site):
    for page in (site / "api").glob("*.html"):
        assert "<blockquote>" not in page.read_text(encoding="utf-8"), "an example belongs under `Examples:`"


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")), ids=lambda page: page.name)
def test_links_of_pages_outside_of_the_site_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), target
        headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w]+", "-", heading.lower()).strip("-") for heading in headings]


def modules_with_examples():
    for package in PACKAGES:
        for file in package.rglob("*.py"):
            if ">>> " in file.read_text(encoding="utf-8"):
                yield ".".join(file.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("name", sorted(modules_with_examples()))
def test_examples_of_docstrings(name):
    result = doctest.testmod(import_module(name))
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize("code", blocks("pycon"))
def test_examples_of_pages(code):
    test = doctest.DocTestParser().get_doctest(code, {}, "page", None, 0)
    assert not doctest.DocTestRunner().run(test).failed


@pytest.mark.parametrize("code", blocks("python"))
def test_imports_of_examples(code):
    tree = ast.parse(code)
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), "page", "exec"), {})


@pytest.mark.parametrize("code", blocks("json"))
def test_documents_are_read(code, tmp_path):
    (tmp_path / "metadata.jsonl").write_text(code, encoding="utf-8")
    assert len(read_metadata(tmp_path)) == len(code.splitlines())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tasks_are_tasks(page):
    for row in re.findall(r"\{roles: \{[^}]*\}[^}]*\}", page.read_text(encoding="utf-8")):
        Task.of(yaml.safe_load(row))


@pytest.mark.parametrize("code", blocks("yaml"))
def test_settings_of_samplers_are_valid(code):
    for name, settings in yaml.safe_load(code).items():
        if isinstance(settings, dict) and not settings.keys() & {"plugin", "class_path", "weighting", "process"}:
            load_sampler(settings, None, name)


@cache
def parameters(path):
    """Names of the parameters of a class, its base classes' among them."""
    module, _, name = path.rpartition(".")
    classes = inspect.getmro(getattr(import_module(module), name))
    return {parameter for part in classes for parameter in inspect.signature(part.__init__).parameters}


def check_training(words):
    """That the options of `multidiff fit` exist, and that `--config` names a file or a shipped configuration."""
    arguments = dict(zip(words, [*words[1:], ""], strict=True))
    config = arguments.get("--config", "digits")
    if not config.endswith(".yaml"):
        configuration.find(config)
    classes = yaml.safe_load(configuration.find("digits" if config.endswith(".yaml") else config).read_text())
    for word in words:
        if match := re.match(r"--(model|data)\.init_args\.(\w+)", word):
            assert match[2] in parameters(classes[match[1]]["class_path"]), word
        elif match := re.match(r"--trainer\.(\w+)", word):
            assert match[1] in inspect.signature(Trainer.__init__).parameters, word
        elif word.startswith("--"):
            plain = {"--config", "--ckpt_path", "--help", "--print_config", "--overwrite"}
            assert word in plain or re.fullmatch(r"--(model|data|trainer\.callbacks)\.help", word), word


def check_options(words, source):
    """That the options of a command are in its source or in the package beside it, and that sampler settings exist."""
    files = [source, *source.with_name(f"{source.stem}s").glob("*.py")]
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    for word in words:
        option = word.partition("=")[0]
        if match := re.fullmatch(r"--sampler\.\w+\.(\w+)", option):
            assert match[1] in MaskSampler().settings, option
        elif option.startswith("--"):
            assert f'"{option}"' in text, f"{source} has no option {option}"


@pytest.mark.parametrize("code", blocks("sh"))
def test_commands_exist(code):
    for line in code.replace("\\\n", " ").splitlines():
        words = re.sub(r"'[^']*'", "VALUE", line).split(" #")[0].split()
        words = [word.removeprefix(".venv/bin/") for word in words]
        if words[:1] in (["srun"], ["torchrun"]):  # which start the command that follows
            words = words[words.index("multidiff") :]
        match words:
            case ["multidiff", "fit" | "validate" | "test" | "tokenize", *rest]:
                check_training(rest)
            case ["multidiff", "generate", *rest]:
                check_options(rest, ROOT / "multidiff" / "cli" / "generate.py")
            case ["multidiff", "consolidate", *rest]:
                check_options(rest, ROOT / "multidiff" / "cli" / "consolidate.py")
            case ["multidiff", command, *_]:
                assert command in ("plugins", "new-tokenizer", "--help", "--version"), line
            case ["make", target, *_]:
                assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M), line
            case ["python", "-m", "pip" | "pytest" | "multidiff.evaluation.harness", *_]:  # options of others
                pass
            case ["python", "-m", module, *rest]:
                spec = util.find_spec(f"{module}.__main__") if (ROOT / module).is_dir() else util.find_spec(module)
                origin = Path(str(spec and spec.origin))
                check_options(rest, origin.parent / "__main__.py" if origin.name == "__init__.py" else origin)
            case ["python", script, *rest] if script.startswith("scripts/"):
                if "--" in rest:  # options of a training follow
                    check_training(rest[rest.index("--") + 1 :])
                    rest = rest[: rest.index("--")]
                check_options(rest, ROOT / script)
