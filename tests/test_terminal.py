"""What a command writes to the terminal: its help, one-line errors, and progress instead of logs."""

import json
import logging
import re
import sys
import warnings

import numpy as np
import pytest
import transformers.trainer
from conftest import make_images
from transformers import TrainingArguments

from iekd_hf.commands import cli, detect, distill, export, mutual, segment
from iekd_hf.commands.parser import CommandParser
from iekd_hf.commands.progress import Progress
from iekd_hf.commands.run import find_start
from iekd_hf.commands.terminal import command


# ---- Help ----


def help_of(module, **kwargs) -> str:
    return CommandParser(module.KINDS, module.__doc__, "iekd-hf x", **kwargs).format_help()


@pytest.mark.parametrize("module", [distill, mutual, detect, segment])
def test_the_help_begins_with_what_matters(module):
    """What the command does, three arguments and two examples, before the first group; Trainer's are left out."""
    text = help_of(module)
    opening, groups = text.split("\n\nTeacher and student:\n" if module is not mutual else "\n\nPeers:\n")
    assert len(opening.splitlines()) <= 16
    assert len(re.findall(r"^  --\w+ ", opening, flags=re.MULTILINE)) == 3
    assert len(re.findall(r"^  iekd-hf ", opening, flags=re.MULTILINE)) == 2
    assert re.findall(r"^(\w.*):$", groups, flags=re.MULTILINE) == ["Images", "Method", "Training", "Help"]
    assert "--adam_beta1" not in text and "--adam_beta1" in help_of(module, with_trainer=True)


@pytest.mark.parametrize("module", [distill, mutual, detect, segment, export])
def test_no_default_is_told_twice_and_no_opposite_is_shown(module):
    text = help_of(module)
    arguments = re.split(r"^  (?=-)", text, flags=re.MULTILINE)[1:]
    assert [argument for argument in arguments if argument.count("Default:") > 1 or "(default" in argument] == []
    assert "--no_" not in text
    everywhere = help_of(module, with_trainer=True)
    names = re.findall(r"^  (--\w+)", everywhere.split("\n\nHelp:")[0], flags=re.MULTILINE)
    parser = CommandParser(module.KINDS, "", "x")
    known = {
        action.option_strings[0] for action in parser._actions if not action.option_strings[0].startswith("--no_")
    }
    refused = {f"--{name}" for kind in module.KINDS for name in getattr(kind, "_refused", ())}
    assert known - refused <= {*names, "-h", "--help_all", "--debug"}
    assert refused <= known and not refused & {*names}


def test_opposites_and_abbreviations_still_work(tmp_path):
    read = CommandParser(distill.KINDS, "", "x").read
    model_args, _, args = read(["--no_plain_student", "--lambda-inh", "3", "--output_dir", str(tmp_path)])
    assert model_args.plain_student is False and args.lambda_inh == 3
    assert read(["--debug", "--output_dir", "out"])[2].debug == []
    assert [option.value for option in read(["--debug", "underflow_overflow"])[2].debug] == ["underflow_overflow"]
    (tmp_path / "recipe.json").write_text(json.dumps({"output_dir": "elsewhere"}))
    assert read([str(tmp_path / "recipe.json"), "--debug"])[2].output_dir == "elsewhere"
    assert read(["--debug", str(tmp_path / "recipe.json")])[2].output_dir == "elsewhere"


def test_the_command_line_takes_precedence_over_a_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("output_dir: a\nseed: 1\nlambda_inh: 300\nreport_to: [tensorboard, wandb]\nplain_student: true")
    given = [
        str(recipe),
        "--output_dir",
        "b",
        "--lambda_inh",
        "auto",
        "--report_to",
        "none",
        "--plain_student",
        "false",
    ]
    model_args, _, args = CommandParser(distill.KINDS, "", "x").read(given)
    assert (args.output_dir, args.lambda_inh, args.report_to, model_args.plain_student) == ("b", "auto", [], False)
    assert args.seed == 1


def test_values_of_a_recipe(tmp_path):
    """As a command line has them: PyYAML takes 5e-4 for text, and people put numbers and bools in quotes."""
    recipe = tmp_path / "recipe.yaml"
    lines = ["max_grad_norm: 1e0", "weight_decay: '5e-4'", "lambda_inh: 1.5E+3", "teacher: 1e3x", "student: '1e3'"]
    lines += ["plain_student: 'false'", "max_train_samples: '10'", "horizontal_flip: no", "save_total_limit:"]
    lines += ["report_to: [tensorboard, wandb]", "lr_scheduler_kwargs: {num_cycles: 2}", "lambda_exp: auto"]
    recipe.write_text("\n".join(["output_dir: out", "resume_from_checkpoint: true", *lines]))
    model_args, data_args, args = CommandParser(distill.KINDS, "", "x").read([str(recipe)])
    assert (args.max_grad_norm, args.weight_decay, args.lambda_inh, args.lambda_exp) == (1.0, 5e-4, 1500.0, "auto")
    assert (model_args.teacher, model_args.student, model_args.plain_student) == ("1e3x", "1e3", False)
    assert (data_args.max_train_samples, data_args.horizontal_flip) == (10, False)
    assert args.report_to == ["tensorboard", "wandb"] and args.lr_scheduler_kwargs == {"num_cycles": 2}
    assert args.save_total_limit is None
    args.output_dir = str(tmp_path / "nothing")
    with pytest.raises(ValueError, match="Expected the output_dir of a run that has begun"):
        find_start(args)


@pytest.mark.parametrize(
    "line, said",
    [
        ("augmentation: cropped", "argument --augmentation: invalid choice: 'cropped'"),
        ("dtype: float8", "argument --dtype: invalid choice: 'float8'"),
        ("labelled_samples: 12.5", r"argument --labelled_samples\S*: invalid int value: '12.5'"),
    ],
)
def test_a_wrong_value_of_a_recipe_is_refused_as_in_a_command_line(line, said, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(line)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["distill", str(tmp_path / "recipe.yaml")])
    assert re.match(f"error: {said}", capsys.readouterr().err)
    (tmp_path / "recipe.yaml").write_text("studnt: x")
    with pytest.raises(ValueError, match="got --studnt=x: did you mean --student"):
        cli.main(["distill", str(tmp_path / "recipe.yaml")])


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("recipe.yaml", "a: [1", r"a file with arguments of iekd-hf distill, got '.*recipe\.yaml': while parsing"),
        ("recipe.yaml", "- a", r"by name in .*recipe\.yaml, such as 'output_dir: out', got \['a'\]"),
        ("recipe.yaml", "", "by name in .*, got None"),
        ("recipe.json", '{"a', r"a file with arguments of iekd-hf distill, got '.*recipe\.json': "),
        ("recipe.json", None, "a file with arguments of iekd-hf distill, got .*: .*No such file"),
    ],
)
def test_a_file_that_holds_no_arguments(name, text, said, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        CommandParser(distill.KINDS, "", "iekd-hf distill").read([str(tmp_path / name)])


# ---- Errors ----


@pytest.mark.parametrize(
    "argv, said",
    [
        (["distill", "--lamda_inh", "3"], "error: Expected arguments of iekd-hf distill, got --lamda_inh 3: did you"),
        (["distill", "--lambda_inh", "-1"], "error: Expected lambda_inh to be a finite weight"),
        (["mutual", "--lambda_kl", "-1"], "error: Expected lambda_kl to be a finite weight"),
        (["detect", "--train_val_split", "2"], "error: Expected train_val_split within"),
        (
            ["export", "--model", "m", "--output", "nowhere/x"],
            "error: Expected --output in a folder that is there, got 'nowhere",
        ),
        (["export", "--model", "nobody/nothing"], "error: Expected --model to be a folder"),
        (["analyze", "--run", "nothing"], "error: Expected a finished run of IEKDTrainer in --run, got 'nothing'"),
    ],
)
def test_a_refusal_is_one_line_and_with_debug_a_traceback(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    otherwise = sys.excepthook
    for debug in ([], ["--debug"]):
        monkeypatch.setattr(sys, "excepthook", otherwise)
        with pytest.raises(ValueError, match=re.escape(said.removeprefix("error: "))) as ended:
            cli.main([*argv, *debug])
        sys.excepthook(ended.type, ended.value, ended.tb)  # as Python does at the end of the process
        out, err = capsys.readouterr()
        assert out == "" and not list(tmp_path.iterdir())
        assert err.startswith("Traceback") if debug else err.startswith(said) and err.count("\n") == 1


def test_an_interruption_is_one_line(monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(distill, "DistillRun", interrupt)
    with pytest.raises(KeyboardInterrupt) as ended:
        cli.main(["distill"])
    sys.excepthook(ended.type, ended.value, ended.tb)
    expected = "interrupted: add --resume_from_checkpoint true to continue a training\n"
    assert capsys.readouterr().err == expected


def test_what_argparse_refuses_is_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["distill", "--inheritance_ratio", "much"])
    assert re.fullmatch(
        r"error: argument --inheritance_ratio\S*: invalid float value: 'much' \(.*\)\n", capsys.readouterr().err
    )


def test_only_other_errors_show_where(monkeypatch, capsys):
    """Errors of this library say what to do; of other ones it may help to know where; bugs keep their traceback."""

    def said_of(error, then=None):
        def main(given):
            raise error

        monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
        with pytest.raises(type(error)):
            command(main)([])
        error = then or error
        sys.excepthook(type(error), error, error.__traceback__)
        return capsys.readouterr().err

    assert said_of(OSError("no space\nleft")) == "error: no space left (--debug shows where)\n"
    assert said_of(FloatingPointError("Expected finite losses")) == "error: Expected finite losses\n"
    assert said_of(KeyError("a bug")).startswith("Traceback")
    assert said_of(ValueError("caught by who called"), then=KeyError("a bug")).startswith("KeyError")
    monkeypatch.setenv("RANK", "1")  # the other processes of a launcher are silent, but end alike
    assert said_of(ValueError("Expected")) == ""
    assert said_of(OSError("of this process")).startswith("error: of this process")


def test_a_process_gets_its_settings_back():
    """Warnings of this library are shown, others are not; who calls a command from Python keeps what was set."""
    before = transformers.logging.get_verbosity(), transformers.trainer.DEFAULT_PROGRESS_CALLBACK, warnings.filters[:]
    seen = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    logging.getLogger("iekd_hf").addHandler(handler)

    @command
    def main(given):
        transformers.trainer.DEFAULT_PROGRESS_CALLBACK = Progress("accuracy", lines=True)
        for module in ("torch.nn", "iekd_hf.training.gradient_shares"):
            warnings.warn_explicit(f"from {module}", UserWarning, "file.py", 1, module)

    try:
        main([])
    finally:
        logging.getLogger("iekd_hf").removeHandler(handler)
    assert seen == ["from iekd_hf.training.gradient_shares"]
    after = transformers.logging.get_verbosity(), transformers.trainer.DEFAULT_PROGRESS_CALLBACK, warnings.filters[:]
    assert after == before


# ---- Progress ----


def train(make_trainer, progress, monkeypatch, **kwargs) -> None:
    monkeypatch.setattr(transformers.trainer, "DEFAULT_PROGRESS_CALLBACK", progress)
    progress.name = "stage 2"
    accuracy = {"compute_metrics": lambda p: {"accuracy": float((p.predictions.argmax(1) == p.label_ids).mean())}}
    make_trainer(disable_tqdm=False, eval_dataset=make_images(8), **accuracy, **kwargs).train()


def test_lines_where_there_is_no_terminal(make_trainer, monkeypatch, capsys):
    """Stage 1 in fifths; stage 2 at its evaluations, which are not told apart from the steps between; no logs."""
    steps = {"max_steps": 10, "paraphraser_max_steps": 10, "eval_strategy": "steps", "eval_steps": 5}
    train(make_trainer, Progress("accuracy", lines=True), monkeypatch, **steps)
    written = capsys.readouterr()
    assert written.out == "" and "\r" not in written.err
    lines = [re.sub(r"[\d.]+ %", "x %", line).split() for line in written.err.splitlines()]
    shown = [(" ".join(words[:2]), words[2].split("/")[0], len(words) > 4) for words in lines]
    assert shown == [
        *(("stage 1", str(step), False) for step in (2, 4, 6, 8, 10)),
        *(("stage 2", str(step), step in (5, 10)) for step in (2, 4, 5, 7, 9, 10)),
    ]


def test_one_bar_a_stage(make_trainer, monkeypatch, capsys):
    """With its name, what is left and the last accuracy; evaluations have none of their own."""
    steps = {"max_steps": 4, "paraphraser_max_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    train(make_trainer, Progress("accuracy", lines=False), monkeypatch, **steps)
    written = capsys.readouterr()
    drawn = [line for line in re.split(r"[\r\n]", written.err) if line.strip()]
    assert written.out == "" and {line.split("%")[0][:9].strip() for line in drawn} == {"stage 1", "stage 2"}
    assert re.search(r"stage 2 .*100%.* 4/4 steps, .* gone, .* left, accuracy \d+\.\d %", drawn[-1]), drawn[-1]


def test_a_bar_that_is_broken_off_is_closed():
    progress = Progress("accuracy", lines=False)

    @command
    def main(given):
        transformers.trainer.DEFAULT_PROGRESS_CALLBACK = progress
        state = transformers.TrainerState(max_steps=3, is_world_process_zero=True)
        progress.on_train_begin(TrainingArguments("out"), state, None)
        raise ValueError("Expected more")

    with pytest.raises(ValueError, match="Expected more"):
        main([])
    assert progress.bar is None


# ---- Pictures ----


def history(count: int = 3) -> list[dict]:
    logs = [{"step": s, "epoch": s, "eval_accuracy": s / 10} for s in range(1, count + 1)]
    return [*logs, {"step": 1, "epoch": 1, "task_loss": 1.0, "exploration_loss": -0.1}]


@pytest.fixture
def drawn(monkeypatch):
    """Return the figures that are saved, by their file's name."""
    from matplotlib.figure import Figure

    figures, save = {}, Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, path, **kw: (figures.update({path.name: self}), save(self, path, **kw))
    )
    return figures


def texts(figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(lambda a: hasattr(a, "get_text")))


def test_the_picture_of_a_gain(drawn, tmp_path):
    """Its title is the gain; lines have names and final values; what is newly right is shown with its two labels."""
    import PIL.Image

    from iekd_hf.commands.report.curves import Examples, draw_gain, draw_losses
    from iekd_hf.commands.report.table import Result

    rows = [
        Result("teacher", 30, {"accuracy": 0.9}, log_history=history()),
        Result("plain student", 10, {"accuracy": 0.5}, log_history=history()),
        Result(
            "distilled student", 10, {"accuracy": 0.75}, log_history=history(), gradient_shares={"inheritance": 4.0}
        ),
    ]
    images = [PIL.Image.new(mode, size) for mode, size in (("L", (8, 8)), ("RGB", (400, 300)), ("RGB", (9, 50)))]
    names = ["cat", "a name that is long beyond reason"]
    examples = Examples(
        [*images, images[0]], np.array([0, 1, 1, 0]), np.array([0, 0, 0, 0]), np.array([1, 1, 1, 0]), names
    )
    draw_gain(rows, tmp_path / "report.png", 4, examples)
    draw_losses(rows[-1], tmp_path / "losses.png")
    shown = texts(drawn["report.png"])
    assert "The teacher adds 25.0 points to the same network, on 4 validation images." in shown
    assert "now right: 2, now wrong: 1" in shown and shown.count("plain: cat") == 2 and "it is a name that i…" in shown
    for label in ("teacher 90.0 %", "plain student 50.0 %", "distilled student 75.0 %", "inheriting"):
        assert label in shown
    assert {"task loss", "exploration loss"} <= set(texts(drawn["losses.png"]).splitlines())
    assert all((tmp_path / name).stat().st_size > 5_000 for name in ("report.png", "losses.png"))


def test_pictures_of_less(drawn, tmp_path):
    """Without a plain student, without a measured teacher, without any measurement, and of peers."""
    from iekd_hf.commands.report.curves import draw_gain, draw_losses, draw_peers
    from iekd_hf.commands.report.table import Result

    teacher, alone = Result("teacher", 30), Result("distilled student", 10, {"accuracy": 0.75}, log_history=history())
    draw_gain([teacher, alone], tmp_path / "a.png", 4)
    assert "The distilled student has 75.0 % on 4 validation images." in texts(drawn["a.png"])
    draw_gain([teacher, Result("distilled student", 10)], tmp_path / "b.png", 4)
    assert "How the distilled student has learnt" in texts(drawn["b.png"])
    draw_losses(Result("peer 1", 10), tmp_path / "none.png")
    assert "none.png" not in drawn
    ways = {"peer 1 alone": 0.5, "peer 2 alone": 0.6, "peer 1, IE-DML": 0.75, "peer 2, IE-DML": 0.55}
    rows = [Result(name, 10, {"accuracy": value}, log_history=history()) for name, value in ways.items()]
    draw_peers(rows, tmp_path / "peers.png")
    shown = texts(drawn["peers.png"])
    assert "peer 1 75.0 % (+25.0 points over alone), peer 2 55.0 % (-5.0 points over alone)" in shown
    assert "alone 60.0 %" in shown and "IE-DML 55.0 %" in shown
