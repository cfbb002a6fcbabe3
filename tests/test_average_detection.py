"""Detection runs put together: what counts once, means and intervals by hand, what is refused."""

import functools
import json
import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "benchmarks"))

import average_accuracy
import average_detection


TEACHER = {"map": 0.6, "map_50": 0.9, "map_75": 0.7, "map_large": 0.1, "map_cat": 0.6}


@pytest.fixture
def average(run_example):
    return functools.partial(run_example, average_detection)


def write_run(folder, seed, distilled, plain=None, method="ie-ft", weights=(3000.0, 300.0), teacher=TEACHER, **more):
    settings = {"seed": seed, "method": method, "lambda_inh": weights[0], "lambda_exp": weights[1], **more}

    def model(parameters, value):
        metrics = {"map": value, "map_50": 0.5, "map_75": 0.25, "map_cat": 0.125}
        return {"parameters": parameters, "metrics": metrics}

    models = {"teacher": {"parameters": 2000, "metrics": teacher}}
    if plain is not None:
        models["plain student"] = model(1000, plain)
    models["distilled student"] = model(1000, distilled)
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"settings": settings, "models": models}))
    (folder / "train_results.json").write_text(json.dumps({"inheritance_loss_gradient_share": 0.5, "epoch": 1}))
    return folder


def test_the_table_by_hand(average, tmp_path):
    """Two seeds, 1 degree of freedom: t = 12.706; 0.4 and 0.5 deviate by 0.0707, whose mean is known to +- 63.5."""
    runs = [
        write_run(tmp_path / "a", 1, 0.45, plain=0.4),
        write_run(tmp_path / "b", 2, 0.56, plain=0.5),
        write_run(tmp_path / "c", 2, 0.52, method="ft", weights=(1500.0, 0.0)),  # the same teacher, no plain student
        write_run(tmp_path / "d", 1, 0.5, method="plain", weights=(0.0, 0.0), inherit_head=True),
    ]
    file = tmp_path / "all.json"
    lines = average("--runs", *runs, "--output_file", file).splitlines()
    assert lines[0] == "| model | parameters | seeds | mAP | mAP50 | mAP75 | cat | mAP - plain student |"
    assert lines[2:] == [
        "| teacher | 2,000 | 1 | 60.0 | 90.0 | 70.0 | 60.0 |  |",
        "| plain student | 1,000 | 2 | 45.0 ± 63.5 | 50.0 | 25.0 | 12.5 |  |",
        "| ie-ft, 3000, 300 | 1,000 | 2 | 50.5 ± 69.9 | 50.0 | 25.0 | 12.5 | +5.50 ± 6.35 |",
        "| ft, 1500 | 1,000 | 1 | 52.0 | 50.0 | 25.0 | 12.5 | +2.00 |",
        "| plain, teacher's head | 1,000 | 1 | 50.0 | 50.0 | 25.0 | 12.5 | +10.00 |",
    ]
    written = json.loads(file.read_text())
    assert [run["settings"]["seed"] for run in written] == [1, 2, 2, 1]
    assert written[0]["gradient_shares"] == {"inheritance_loss_gradient_share": 0.5}


def test_teachers_of_their_own_count_each_and_classifiers_do_not(average, tmp_path):
    first = write_run(tmp_path / "a", 1, 0.4)
    second = write_run(tmp_path / "b", 2, 0.4, teacher={**TEACHER, "map": 0.5})
    assert "| teacher | 2,000 | 2 | 55.0 ± 63.5 |" in average("--runs", first, second)
    classifier = write_run(tmp_path / "c", 3, 0.4, teacher={})
    assert "teacher" not in average("--runs", classifier)


def test_what_is_refused(average, tmp_path):
    run = write_run(tmp_path / "a", 1, 0.4)
    again = write_run(tmp_path / "b", 1, 0.5)
    with pytest.raises(ValueError, match=r"runs that differ in seed or method, got .*a' and .*b': keep one"):
        average("--runs", run, again)
    with pytest.raises(ValueError, match=r"of a finished run, got .*nothing' without results.json"):
        average("--runs", run, tmp_path / "nothing")
    other = write_run(tmp_path / "c", 2, 0.5, teacher={"map": 0.6, "map_50": 0.9, "map_75": 0.7, "map_dog": 0.6})
    with pytest.raises(ValueError, match=r"on the same classes, got .*'map_dog'.* beside .*'map_cat'"):
        average("--runs", run, other)
    with pytest.raises(ValueError, match=r"with output folders of finished runs, got none"):
        average()
    longer = write_run(tmp_path / "d", 1, 0.45, epochs=30)  # of which the row says nothing
    with pytest.raises(ValueError, match=r"of 'ie-ft, .*' with seed 1, got two that differ, 40\.00 and 45\.00"):
        average("--runs", run, longer)
    models = [{"plain student": {"metrics": {"accuracy": value}}} for value in (0.5, 0.5, 0.75)]
    runs = [{"settings": {"seed": 1}, "models": measured} for measured in models]
    assert average_accuracy.accuracies(runs[:2]) == {"plain student": {1: 50.0}}  # each run has trained it alike
    with pytest.raises(ValueError, match=r"of 'plain student' with seed 1, got two that differ, 50\.00 and 75\.00"):
        average_accuracy.accuracies(runs)
