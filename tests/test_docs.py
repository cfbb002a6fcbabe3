"""The documents: generated tables, links, anchors, and a README that stays short."""

import configparser
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """Return the anchors of the headings, which GitHub and mkdocs make alike where a heading is ASCII."""
    headings = re.findall(r"^#+ (.+)$", without_code(path.read_text()), flags=re.MULTILINE)
    assert all(heading.isascii() for heading in headings), path
    slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings]
    assert len(slugs) == len(set(slugs)), f"{path} has two headings with one anchor"
    return set(slugs)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_anchors_resolve(path):
    for link in LINK.findall(without_code(path.read_text())):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.is_file(), f"{path.name} links to {link}, which does not exist"
        assert not anchor or anchor in anchors(target), f"{path.name} links to {link}, which has no such heading"
        if path.is_relative_to(ROOT / "docs"):
            assert target.is_relative_to(ROOT / "docs"), f"{path.name} links to {link}, which the site does not have"


def test_every_page_is_linked_from_the_readme_or_a_page():
    linked = {ROOT / "docs" / "index.md", ROOT / "docs" / "package.md"}  # the fronts of the site and of the package
    for path in DOCUMENTS:
        links = [link.partition("#")[0] for link in LINK.findall(without_code(path.read_text()))]
        linked |= {(path.parent / link).resolve() for link in links if link and not link.startswith("https://")}
    assert set((ROOT / "docs").rglob("*.md")) <= linked


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1150


@pytest.fixture
def generate(monkeypatch):
    """Return docs/generate.py as a module, and a function that runs it with a command line."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec.loader.exec_module(module)

    def run(*arguments: str, root: Path = ROOT) -> None:
        monkeypatch.setattr(sys, "argv", ["generate.py", *arguments])
        monkeypatch.setattr(module, "ROOT", root)
        module.main()

    return run


def test_generated_tables_are_up_to_date(generate):
    generate("--check")


def test_a_figure_that_was_changed_by_hand_is_found(generate, tmp_path):
    for folder in ("docs", "iekd_hf/commands/help"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    readme = (ROOT / "README.md").read_text()
    assert "| `od` | 81.61 " in readme
    (tmp_path / "README.md").write_text(readme.replace("| `od` | 81.61 ", "| `od` | 91.61 "))
    with pytest.raises(SystemExit, match=r"got others in README\.md: run python docs/generate\.py"):
        generate("--check", root=tmp_path)
    generate(root=tmp_path)
    assert (tmp_path / "README.md").read_text() == readme


def test_the_site_builds(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    program = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "results" / "index.html").is_file()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(path):
    """Links would leave the site, so files of the code are named as code."""
    named = re.findall(r"`((?:iekd_hf|examples|tests|docs)/[\w/.-]+)`", path.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_links_of_the_package_index_work_there():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    text = (ROOT / config["metadata"]["long_description"].removeprefix("file: ")).read_text()
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert targets and all(target.startswith("https://") for target in targets)


RESULTS = sorted((ROOT / "examples" / "benchmarks" / "results").glob("*.json"))
NOT_OF_RUNS = {"analysis", "speed", "speed_peers", "streams"}


@pytest.mark.parametrize(
    "path", [path for path in RESULTS if path.stem not in NOT_OF_RUNS], ids=lambda path: path.stem
)
def test_results_of_runs_have_one_form(path):
    """As docs/results/index.md has it: settings, models with their metrics, and gradient shares."""
    runs = json.loads(path.read_text())
    assert len({json.dumps(run["settings"], sort_keys=True) for run in runs}) == len(runs)
    for run in runs:
        assert run.keys() <= {"settings", "models", "gradient_shares", "training", "made", "log", "phases"}
        assert isinstance(run["settings"]["seed"], int)
        assert run["models"] and isinstance(run["gradient_shares"], dict)
        for model in run["models"].values():
            assert all(isinstance(value, (int, float)) for value in model["metrics"].values())
