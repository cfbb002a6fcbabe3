"""The example script of mutual learning: the table with its three ways, resuming, and its errors."""

import functools
import json
import re
import shutil
from pathlib import Path

import pytest
import run_mutual
from conftest import break_off, make_resnet, same
from transformers import AutoModelForImageClassification

from iekd_hf.commands.mutual import of_peer


QUICK = ["--peers", "cifar-resnet-8", "cifar-resnet-8", "--max_train_samples", "64", "--max_eval_samples", "32"]
QUICK += ["--num_train_epochs", "1", "--disable_tqdm", "true", "--per_device_train_batch_size", "16", "--use_cpu"]
AS_GIVEN = ["--do_train", "false"]
ROWS = ["peer 1 alone", "peer 2 alone", "peer 1, DML", "peer 2, DML", "peer 1, IE-DML", "peer 2, IE-DML"]


@pytest.fixture
def run(run_example):
    return functools.partial(run_example, run_mutual)


@pytest.mark.slow
def test_the_digits_from_nothing_to_the_table(run, tmp_path):
    printed = run("--output_dir", tmp_path, *QUICK)
    found = re.findall(
        r"^(peer \d.*?) +78,042 +\d+\.\d\d% +\d+\.\d\d% +(training|together) \d+\.\d$", printed, flags=re.MULTILINE
    )
    assert [name for name, _ in found] == ROWS, printed
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("report.png", "losses.png"))
    assert "{" not in printed and "{" not in run.func.said
    assert re.findall(r"^\[(\d)/4\] (Peer\w* \w+)", run.func.said, re.MULTILINE) == [
        *(("1", "Peer 1"), ("2", "Peer 2"), ("3", "Peers together"), ("4", "Peers together")),
    ]
    for name in ("peer_1", "peer_2", "_peer_1_alone", "_peer_2_alone", "_dml/peer_1", "_dml/peer_2"):
        _, info = AutoModelForImageClassification.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(info.values())
    saved = ["--peers", tmp_path / "peer_1", tmp_path / "peer_2"]
    measured = run("--output_dir", tmp_path / "measured", *QUICK, *saved, *AS_GIVEN)
    accuracies = [re.findall(r"^peer \d,.* (\d+\.\d\d)% ", text, flags=re.MULTILINE) for text in (printed, measured)]
    assert accuracies[0][2:] == accuracies[1]
    assert json.loads((tmp_path / "measured" / "results.json").read_text())["settings"] == {}
    with pytest.raises(
        ValueError, match=r"an output_dir that holds no run with --do_train false, got .*choose another"
    ):
        run("--output_dir", tmp_path, *QUICK, *saved, *AS_GIVEN)
    with pytest.raises(ValueError, match=r"without checkpoints, got .* with checkpoint-4: add --resume"):
        run("--output_dir", tmp_path, *QUICK)


@pytest.mark.slow
def test_resume_reuses_what_is_finished(run, tmp_path):
    common = ["--output_dir", tmp_path, *QUICK, "--num_train_epochs", "2", "--save_total_limit", "5"]
    run(*common)
    folders = ("peer_1", "peer_2")
    finished = [AutoModelForImageClassification.from_pretrained(tmp_path / name).state_dict() for name in folders]
    beside = [tmp_path / name / "model.safetensors" for name in ("_peer_1_alone", "_dml/peer_2")]
    times = [path.stat().st_mtime_ns for path in beside]
    shutil.rmtree(tmp_path / "checkpoint-8")
    printed = run(*common, "--resume_from_checkpoint", "true")
    assert [path.stat().st_mtime_ns for path in beside] == times
    assert all(re.search(rf"^{name} .*\d%", printed, flags=re.MULTILINE) for name in ROWS), printed
    for name, state in zip(folders, finished, strict=True):
        assert same(AutoModelForImageClassification.from_pretrained(tmp_path / name).state_dict(), state)
    break_off(tmp_path)
    run(*common, "--resume_from_checkpoint", "true")
    assert [path.stat().st_mtime_ns for path in beside] == times
    for name, state in zip(folders, finished, strict=True):
        assert same(AutoModelForImageClassification.from_pretrained(tmp_path / name).state_dict(), state)


def test_a_peers_own_metrics():
    """Whatever the means are called, and without those of the others."""
    logs = {"accuracy": 0.5, "peer_1_accuracy": 0.4, "peer_2_accuracy": 0.6, "peer_1_top5_accuracy": 0.7, "epoch": 1}
    logs |= {"peer_2_top5_accuracy": 0.9, "top5_accuracy": 0.8, "peer_1/loss": 1.0, "peer_2/loss": 2.0}
    assert of_peer(1, logs) == {"accuracy": 0.4, "top5_accuracy": 0.7, "loss": 1.0, "epoch": 1}
    assert of_peer(2, logs) == {"accuracy": 0.6, "top5_accuracy": 0.9, "loss": 2.0, "epoch": 1}


@pytest.mark.slow
def test_logits_only_from_pretrained_models(run, tmp_path):
    make_resnet(8, num_labels=7, seed=1).save_pretrained(tmp_path / "first")
    make_resnet(16, num_labels=5, seed=2).save_pretrained(tmp_path / "second")
    peers = ["--peers", tmp_path / "first", tmp_path / "second", "cifar-resnet-8", "--peers_from_scratch", "false"]
    printed = run(
        *["--output_dir", tmp_path / "out", *QUICK[3:], *peers, "--mutual_loss", "kl", "--alone", "false"],
        *["--metric_for_best_model", "peer_2_accuracy", "--load_best_model_at_end", "true"],
    )
    assert re.findall(r"^(peer \d, \S+) ", printed, flags=re.MULTILINE) == [f"peer {i}, DML" for i in (1, 2, 3)]
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "peer_2").config
    assert config.num_labels == 10 and config.hidden_sizes == [8, 16]


def test_errors(run, tmp_path):
    with pytest.raises(ValueError, match=r"--peers .*'nobody/nothing'.*HF_HUB_CACHE"):
        run("--output_dir", tmp_path, *QUICK, "--peers", "cifar-resnet-8", "nobody/nothing")
    with pytest.raises(ValueError, match="at least two models, got 1"):
        run("--output_dir", tmp_path, *QUICK, "--peers", "cifar-resnet-8", "--alone", "false")
    assert not list(tmp_path.iterdir())
    best = ["--eval_strategy", "epoch", "--metric_for_best_model", "peer_3_accuracy"]
    with pytest.raises(ValueError, match=r"_best_model, got 'peer_3_accuracy': choose one of acc.* peer_1_acc"):
        run("--output_dir", tmp_path, *QUICK, *best)


def test_help_explains(run, capsys):
    with pytest.raises(SystemExit, match="0"):
        run("--help")
    text = capsys.readouterr().out
    for name in ("--peers", "--mutual_loss", "--lambda_inh", "--train_file", "--push_to_hub"):
        assert re.search(rf"{name}\b", text)


@pytest.mark.slow
def test_the_benchmark_of_a_step(run_example, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(run_mutual.__file__).parent / "benchmarks"))
    import mutual_step

    small = ["--depths", "8", "8", "--batch_size", "4", "--image_size", "16", "--rounds", "2"]
    printed = run_example(mutual_step, *small)
    rows = {name: float(value) for value, name in re.findall(r"^ +([\d.]+)  (.*?)(?: \(.*)?$", printed, re.MULTILINE)}
    assert list(rows)[-4:] == [
        "sum of the passes",
        "step of the trainer, its four optimizer steps included",
        "step / passes",
        "control / passes",
    ]
    assert len(rows) == 10 and all(value > 0 for value in rows.values()), printed
