"""The console command: its subcommands, what they say where a package is missing, and the scripts that call them."""

import ast
import configparser
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from iekd_hf.commands import cli
from iekd_hf.commands.export import ExportArguments
from iekd_hf.commands.parser import CommandParser


ROOT = Path(__file__).parent.parent
OPTIONAL = ("captum", "kornia", "matplotlib", "onnx", "onnxruntime", "onnxscript", "pycocotools", "sklearn")
SCRIPTS = {
    "run_iekd": "distill",
    "run_mutual": "mutual",
    "run_iekd_detection": "detect",
    "run_iekd_segmentation": "segment",
    "export_onnx": "export",
    "analyze_student": "analyze",
}


def test_help_lists_the_commands_with_an_example_each(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    text = capsys.readouterr().out
    for command, (what, _) in cli.COMMANDS.items():
        assert re.search(rf"^  {command} +{re.escape(what)}\n +iekd-hf {command} --\w", text, flags=re.MULTILINE), text


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_examples_of_the_help_are_arguments(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert text.startswith(f"usage: iekd-hf {command} ") and text.count(f"iekd-hf {command} --") >= 1
    for name in re.findall(r"--\w+", cli.COMMANDS[command][1]):
        assert re.search(rf"^  {name}\b", text, flags=re.MULTILINE), name


@pytest.mark.parametrize("script, command", SCRIPTS.items())
def test_a_script_is_its_command(script, command, run_example, capsys):
    """And imports nothing else, so that it can be copied anywhere and answers --help at once."""
    tree = ast.parse((ROOT / "examples" / f"{script}.py").read_text())
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [ast.unparse(node) for node in imported] == [
        "import sys",
        "from iekd_hf.commands.cli import main as iekd_hf",
    ]
    module = importlib.import_module(script)
    texts = []
    for call in (lambda: run_example(module, "--help"), lambda: cli.main([command, "--help"])):
        with pytest.raises(SystemExit, match="0"):
            call()
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith(f"usage: iekd-hf {command} ")


@pytest.mark.parametrize("argv, said", [([], "required: COMMAND"), (["train"], "invalid choice: 'train'")])
def test_another_command_is_refused(argv, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(argv)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "command, missing, installed_as, extra",
    [
        ("distill", ["kornia"], "kornia", "cli"),
        ("mutual", ["matplotlib", "sklearn"], "matplotlib and scikit-learn", "cli"),
        ("detect", ["pycocotools"], "pycocotools", "cli"),
        ("segment", ["matplotlib"], "matplotlib", "cli"),
        ("analyze", ["captum"], "captum", "cli"),
        ("export", ["onnxruntime"], "onnxruntime", "onnx"),
    ],
)
def test_a_missing_package_is_named_in_one_sentence(command, missing, installed_as, extra, tmp_path, monkeypatch):
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.chdir(tmp_path)
    needed = ["--model", "out"] if command == "export" else []
    with pytest.raises(SystemExit) as ended:
        cli.main([command, *needed])
    expected = rf'Expected {installed_as} to be installed, .*: run pip install "iekd_hf\[{extra}\]"\.'
    assert re.fullmatch(expected, ended.value.code)
    assert not list(tmp_path.iterdir())


def test_the_extras_hold_what_the_commands_need():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"].items()
    extras = {name: re.findall(r"^[\w-]+", packages, re.MULTILINE) for name, packages in extras}
    for path in (ROOT / "iekd_hf" / "commands").glob("*.py"):
        for extra, names in re.findall(r"^    require\(\"(\w+)\", (.*)\)$", path.read_text(), re.MULTILINE):
            packages = {name.replace("sklearn", "scikit-learn") for name in re.findall(r"\w+", names)}
            assert packages <= set(extras[extra]), path
    assert set(extras["cli"]) | set(extras["onnx"]) <= set(extras["test"])
    assert config["options.entry_points"]["console_scripts"].strip() == "iekd-hf = iekd_hf.commands.cli:main"


def test_packages_are_imported_late():
    """
    The package and the help of all commands need the standard library alone, no command an optional package before it
    is called; and Transformers, imported later, knows the CIFAR ResNets.
    """
    script = f"""
import sys
import iekd_hf, iekd_hf.commands.cli
for argv in [["--help"], *([name, "--help"] for name in iekd_hf.commands.cli.COMMANDS)]:
    try:
        iekd_hf.commands.cli.main(argv)
    except SystemExit as ended:
        assert ended.code == 0
imported = {{name.split(".")[0] for name in sys.modules}}
assert not imported & {{"torch", "transformers", "datasets", "numpy", *{OPTIONAL}}}
assert not [name for name in sys.modules if name.startswith("iekd_hf.commands.") and name != "iekd_hf.commands.cli"]
from transformers import AutoConfig
assert AutoConfig.for_model("cifar_resnet", depths=[1, 1, 1]).depths == [1, 1, 1]
sys.modules.update(dict.fromkeys({OPTIONAL}))
import {", ".join(f"iekd_hf.commands.{name}" for name in cli.COMMANDS)}
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_command_itself_needs_the_standard_library_alone():
    for node in ast.walk(ast.parse(Path(cli.__file__).read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert all(module.split(".")[0] in sys.stdlib_module_names for module in modules)


def test_half_a_name_is_no_argument():
    """`--learning_rat 3` would have trained with a learning rate of 3."""
    parser = CommandParser((ExportArguments,), "Export a model.", "iekd-hf export")
    with pytest.raises(ValueError, match=r"got --outpu x: did you mean --output\?"):
        parser.read(["--model", "out", "--outpu", "x"])
