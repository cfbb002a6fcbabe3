"""What is written in several files of the project is the same in all of them."""

import configparser
import re
import subprocess
from pathlib import Path

import pytest
import yaml

import iekd_hf


ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def pinned(name: str) -> dict[str, str]:
    """Return the versions of a file of constraints by package."""
    return dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / name).read_text().replace("_", "-"), re.MULTILINE))


def test_the_lowest_versions_are_those_of_setup_cfg():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    # The package's own bounds come last and win: the extra "onnx" asks for a newer torch.
    stated = "\n".join([*config["options.extras_require"].values(), config["options"]["install_requires"]])
    lowest = dict(re.findall(r"^([\w-]+)>=([\w.]+)", stated, re.MULTILINE))
    tested = pinned("constraints-minimum.txt")
    assert lowest.keys() == tested.keys()
    assert all(f"{tested[name]}.".startswith(f"{version}.") for name, version in lowest.items())


def test_hooks_check_with_the_same_ruff_as_make():
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["rev"] == f"v{pinned('constraints.txt')['ruff']}"


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == iekd_hf.__version__
    assert "arXiv:2107.00181" in str(citation["references"])


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_targets_that_exist(workflow):
    (job,) = yaml.safe_load(workflow.read_text())["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands and all(re.fullmatch(r"make [a-z-]+", command) for command in commands)
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(f"{command} " in listed for command in commands)


def test_every_target_has_a_line_of_help():
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)", makefile, re.MULTILINE)[1].split()
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^make ([a-z-]+) +\S", listed, re.MULTILINE) == phony
