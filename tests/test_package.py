"""The package as a whole: what it exports, and that its files import one way and nothing optional."""

import ast
import configparser
from pathlib import Path

import pytest

import iekd_hf


ROOT = Path(__file__).parent.parent
FILES = {path.stem: path for path in (ROOT / "iekd_hf").glob("*.py")}


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
    assert iekd_hf.__all__ == sorted(iekd_hf.__all__)


@pytest.mark.parametrize("optional", ["torchvision", "timm", "kornia", "matplotlib", "sklearn", "evaluate"])
def test_nothing_optional_is_imported(optional):
    for name, path in FILES.items():
        assert not any(module.split(".")[0] == optional for module in imports_of(path)), name


def test_imports_go_one_way():
    inside = {name: {i[1:] for i in imports_of(path) if i.startswith(".")} for name, path in FILES.items()}
    order = []
    while inside:
        free = [name for name, needs in inside.items() if needs <= set(order)]
        assert free, f"these import each other: {sorted(inside)}"
        order += free
        for name in free:
            del inside[name]
    for leaf in (
        "distances",
        "adapters",
        "timm_layers",
        "factors",
        "maps",
        "pixels",
        "loading",
        "augmentation",
        "decoded_images",
        "modeling_cifar_resnet",
    ):
        assert not any(i.startswith(".") for i in imports_of(FILES[leaf])), leaf


def test_a_file_stays_readable():
    assert {name: n for name, path in FILES.items() if (n := len(path.read_text().splitlines())) > 320} == {}


def test_requirements_are_stated():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    stated = config["options"]["install_requires"]
    for package in ("torch", "transformers", "datasets", "accelerate", "evaluate", "huggingface-hub", "safetensors"):
        assert f"\n{package}>=" in stated
