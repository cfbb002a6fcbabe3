"""The package as a whole: what it exports, and that its files import one way and nothing optional."""

import ast
import configparser
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from transformers import Trainer

import iekd_hf
from iekd_hf import DistillationTrainer, IEKDTrainer, MutualTrainer


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "iekd_hf"
FILES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}

# In the order in which data flows: a file imports from its own folder and from those before it.
LAYERS = (
    ("data", "models"),
    ("features",),
    ("method",),
    ("argument_types",),
    ("arguments",),
    ("hub", "teacher"),
    ("training",),
    ("iekd_trainer", "mutual_trainer"),
    ("__init__",),
    ("commands",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_everything_exported_exists():
    assert all(hasattr(iekd_hf, name) for name in iekd_hf.__all__)
    assert len(set(iekd_hf.__all__)) == len(iekd_hf.__all__)  # ruff keeps them in order
    assert set(iekd_hf.__all__) <= set(dir(iekd_hf)) and not hasattr(iekd_hf, "Trainer")


def test_type_checkers_see_what_is_imported_late():
    tree = ast.parse(FILES["__init__"].read_text())
    (seen,) = (node for node in tree.body if isinstance(node, ast.If))
    files = {node.module: {alias.name for alias in node.names} for node in seen.body}
    assert files == {file: set(names) for file, names in iekd_hf._FILES.items()}
    assert set().union(*files.values()) == set(iekd_hf.__all__)


@pytest.mark.parametrize("optional", ["torchvision", "timm", "kornia", "matplotlib", "sklearn", "evaluate"])
def test_nothing_optional_is_imported(optional):
    for name, path in FILES.items():
        if name.startswith("commands/"):
            continue
        assert not any(module.split(".")[0] == optional for module in imports_of(path)), name


def inner_imports(name: str) -> set[str]:
    """Return the files of the package that one of its files imports, as `method/losses`."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = Path(name).parents[node.level - 1]
            target = (folder / (node.module or "").replace(".", "/")).as_posix()
            found.add(target if target in FILES else f"{target}/__init__")
    return found


@pytest.mark.parametrize("name", FILES)
def test_imports_go_one_way(name):
    folder = name.split("/")[0]
    for imported in inner_imports(name):
        other = imported.split("/")[0]
        assert other == folder or LEVEL[other] < LEVEL[folder], f"{name} imports {imported}, which comes after it"


def test_no_files_import_each_other():
    needs = {name: inner_imports(name) for name in FILES}
    while free := [name for name, of_name in needs.items() if not of_name & needs.keys()]:
        for name in free:
            del needs[name]
    assert not needs


def test_the_method_knows_no_trainer():
    for name, path in FILES.items():
        if name.startswith("method/"):
            assert "Trainer" not in {
                alias.name
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.ImportFrom)
                for alias in node.names
            }, name


def test_a_file_stays_readable():
    assert len([name for name in FILES if "/" not in name]) <= 6
    assert {name: n for name, path in FILES.items() if (n := code_lines(path)) > 300} == {}


def code_lines(path: Path) -> int:
    """Count the lines that are neither blank, nor comments, nor docstrings."""
    text = path.read_text()
    lines = {i for i, line in enumerate(text.splitlines(), 1) if line.strip() and not line.strip().startswith("#")}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_wheel_and_sdist_are_complete(tmp_path):
    """Built of a copy, without a network: every file of the package, and in the sdist also tests and examples."""
    skipped = shutil.ignore_patterns("__pycache__", "results")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    for folder in ("iekd_hf", "tests", "examples"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=skipped)
    build = "from setuptools import build_meta as b; b.build_wheel('dist'); b.build_sdist('dist')"
    done = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]

    def files_below(*folders: str) -> set[str]:
        paths = (path for folder in folders for path in (tmp_path / folder).rglob("*") if path.is_file())
        return {path.relative_to(tmp_path).as_posix() for path in paths}

    (wheel,), (sdist,) = ((tmp_path / "dist").glob(kind) for kind in ("*.whl", "*.tar.gz"))
    with zipfile.ZipFile(wheel) as opened_wheel, tarfile.open(sdist) as opened_sdist:
        in_wheel = {name for name in opened_wheel.namelist() if ".dist-info/" not in name}
        in_sdist = {name.split("/", 1)[1] for name in opened_sdist.getnames() if "/" in name}
    assert in_wheel == files_below("iekd_hf")
    assert {"iekd_hf/py.typed", "iekd_hf/hub/model_card.md", "iekd_hf/commands/images/data.py"} <= in_wheel
    assert files_below("iekd_hf", "tests", "examples") <= in_sdist
    assert {"README.md", "LICENSE", "CHANGELOG.md", "Makefile", "constraints.txt"} <= in_sdist


def test_requirements_are_stated():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    stated = config["options"]["install_requires"]
    for package in ("torch", "transformers", "datasets", "accelerate", "evaluate", "huggingface-hub", "safetensors"):
        assert f"\n{package}>=" in stated


def test_trainers_are_composed():
    """A responsibility is a file that a trainer uses, not a class between it and Trainer."""
    for trainer in (IEKDTrainer, MutualTrainer):
        between = trainer.__mro__[: trainer.__mro__.index(Trainer)]
        assert [cls.__name__ for cls in between][-2:] == ["DistillationTrainer", "HubTrainer"] and len(between) <= 4
    assert IEKDTrainer.__bases__ == (DistillationTrainer,)


def test_cifar_resnets_may_be_imported_first():
    """A spawned process that unpickles such a model imports its file before anything else imports Transformers."""
    script = """
from iekd_hf.models.modeling_cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
import iekd_hf, transformers
assert iekd_hf.CifarResNetConfig is CifarResNetConfig is type(transformers.AutoConfig.for_model("cifar_resnet"))
model = transformers.AutoModelForImageClassification.from_config(CifarResNetConfig(depths=[1, 1, 1]))
assert type(model) is CifarResNetForImageClassification is iekd_hf.CifarResNetForImageClassification
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
