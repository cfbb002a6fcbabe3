"""Two ranks on CPU (gloo): the same weights on both, in both stages; engines that cannot work are refused."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_images, make_resnet, make_vit, same
from distributed_script import distil_gaps, distil_missing, distil_unlabelled
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageClassification, ResNetForImageClassification

from iekd_hf import IEKDTrainer, IEKDTrainingArguments
from iekd_hf.teacher.sharding import _blocks
from iekd_hf.training.base_trainer import DistillationTrainer


HERE = Path(__file__).parent


def environment() -> dict[str, str]:
    """Return that of ranks, who import from here and have one thread each."""
    return {**os.environ, "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"}


def torchrun(*arguments: str, timeout: int = 300) -> str:
    """`accelerate launch --cpu --num_processes 2` starts one process; torchrun starts two."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def two_machines(tmp_path: Path, folders: list[Path], job: str) -> list[tuple[int, str]]:
    """Run a job on two ranks that torchrun starts as two machines on the loopback address, each with its folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started, logs = [], [tmp_path / f"machine-{rank}.log" for rank in range(2)]
    for rank, (folder, log) in enumerate(zip(folders, logs, strict=True)):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(rank)]
        command += ["--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", port]
        command += [str(HERE / "distributed_script.py"), str(folder), job]
        with log.open("w") as file:
            started.append(subprocess.Popen(command, env=environment(), stdout=file, stderr=file))
    return [(process.wait(300), log.read_text()) for process, log in zip(started, logs, strict=True)]


JOBS = ["resnet", "vit", "dinov2", "mutual-ie", "mutual-kl", "cached", "unlabelled", "sharded", "streams", "auto"]
JOBS += ["best", "gaps", "missing"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Path:
    """Run all jobs on one pair of ranks, as starting it takes longer than they do."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun(str(HERE / "distributed_script.py"), str(folder), *JOBS)
    return folder


def held_by(folder: Path) -> list[dict]:
    """Return what each rank held after a job."""
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("student", ["resnet", "vit", "dinov2"])
def test_two_ranks_are_equal(ranks, student):
    first, second = held_by(ranks / student)
    assert first["world_size"] == second["world_size"] == 2
    assert first["distributed_type"] == "MULTI_CPU"
    # DDP walks each step's graph for the one of them that has a parameter without gradient, and for no other.
    assert first["find_unused_parameters"] == second["find_unused_parameters"] == (student == "dinov2")
    assert same(first["student_side"], second["student_side"])  # weights, encoders, split, BatchNorm statistics
    assert same(first["paraphrasers"], second["paraphrasers"])
    for value in ("eval_loss", "reconstruction_loss", "logs"):
        assert first[value] == second[value]
    if student == "resnet":
        saved = ResNetForImageClassification.from_pretrained(ranks / student / "saved").state_dict()
        held = {k.removeprefix("student."): v for k, v in first["student_side"].items() if k.startswith("student.")}
        assert same(saved, held)


@pytest.mark.slow
@pytest.mark.parametrize("mutual_loss", ["ie", "kl"])
def test_two_ranks_hold_the_same_peers(ranks, mutual_loss):
    folder = ranks / f"mutual-{mutual_loss}"
    first, second = held_by(folder)
    assert first["world_size"] == second["world_size"] == 2
    assert first["distributed_type"] == "MULTI_CPU"
    assert first["find_unused_parameters"] is False
    assert same(first["group"], second["group"])  # a ResNet and a ViT, their encoders, splits and paraphrasers
    assert first["metrics"] == second["metrics"] and first["logs"] == second["logs"]
    before = ResNetForImageClassification.from_pretrained(folder / "before").state_dict()
    saved = ResNetForImageClassification.from_pretrained(folder / "saved" / "peer_1").state_dict()
    held = {k.partition("student.")[2]: v for k, v in first["group"].items() if k.startswith("peers.0.student.")}
    assert same(saved, held) and not same(saved, before)


@pytest.mark.slow
def test_two_ranks_share_the_making_of_the_teachers_cache(ranks):
    first, second = held_by(ranks / "cached")
    # Four blocks (5, 5, 5 and 1 images) of two views, by turns, and a look at the shapes.
    assert (first["seen"], second["seen"]) == (1 + 2 * (5 + 5), 1 + 2 * (5 + 1))
    assert same(first["student_side"], second["student_side"])
    assert first["courses"][1] == pytest.approx(first["courses"][0], rel=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["resnet", "vit", "inside", "bfloat16", "cached"])
def test_a_teacher_shared_out_teaches_the_same(ranks, case):
    for held in held_by(ranks / "sharded"):
        whole, sharded = held[case]["whole"], held[case]["sharded"]
        assert same(whole["student_side"], sharded["student_side"]) and whole["metrics"] == sharded["metrics"]
        assert whole["share"] == 1 and 0.45 < sharded["share"] < 0.6
        assert sharded["kept"] == 0  # gathered, and let go of, by every pass


@pytest.mark.slow
@pytest.mark.parametrize("split", ["dispatched", "by file"])
def test_two_ranks_share_a_stream_and_go_on_in_it(ranks, split):
    first, second = (held[split] for held in held_by(ranks / "streams"))
    for rank in (first, second):
        assert torch.equal(rank["unbroken"]["seen"], torch.cat([rank["broken"]["seen"], rank["resumed"]["seen"]]))
        assert same(rank["unbroken"]["student_side"], rank["resumed"]["student_side"])
    assert same(first["unbroken"]["student_side"], second["unbroken"]["student_side"])
    # 24 images: three batches of four on each rank are a pass, of which no image is on both.
    images = [{image.numpy().tobytes() for image in rank["unbroken"]["seen"][:12]} for rank in (first, second)]
    assert len(images[0]) == len(images[1]) == 12 and len(images[0] | images[1]) == 24


@pytest.mark.slow
@pytest.mark.parametrize("started_as", ["one machine", "two machines"])
def test_two_ranks_find_the_same_weights_and_go_on_with_them(request, tmp_path, started_as):
    if started_as == "one machine":
        folder = request.getfixturevalue("ranks")
    else:
        folder = tmp_path
        two_machines(tmp_path, [folder, folder], "auto")
    first, second = held_by(folder / "auto")
    for rank in (first, second):
        # Measured before the first and the third of four steps.
        at = rank["unbroken"]["weights"]
        assert at[0] == at[1] != at[2] == at[3] and min(at[0]) > 0
        assert rank["resumed"]["weights"] == at  # its log begins with that of the checkpoint
        assert same(rank["unbroken"]["student_side"], rank["resumed"]["student_side"])
    assert first["unbroken"]["weights"] == second["unbroken"]["weights"]
    assert same(first["unbroken"]["student_side"], second["unbroken"]["student_side"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["distil", "teach each other"])
def test_two_ranks_end_with_the_best_checkpoint(ranks, kind):
    best = ranks / "best" / kind / "out" / "checkpoint-2"
    saved = load_file(best / ("" if kind == "distil" else "peer_1") / "model.safetensors")
    for held in held_by(ranks / "best"):
        assert held[kind]["best"] == str(best) and same(held[kind]["model"], saved)


@pytest.mark.slow
def test_machines_that_share_no_disk_cannot_go_on(tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    _, (code, printed) = two_machines(tmp_path, folders, "auto")
    assert code != 0
    assert "or name the run's output_dir, which all machines must see" in printed
    assert not (folders[1] / "auto" / "rank_1.pt").exists()


@pytest.mark.slow
def test_a_rank_without_labels_and_one_with_some_are_one_large_batch(ranks, tmp_path):
    first, second = held_by(ranks / "unlabelled")
    assert same(first["student_side"], second["student_side"])
    _, alone = distil_unlabelled(str(tmp_path), per_device_train_batch_size=8)
    assert first["task_losses"] == pytest.approx(alone["task_losses"], rel=1e-4) and min(alone["task_losses"]) > 0
    assert first["eval_losses"] == second["eval_losses"] == pytest.approx(alone["eval_losses"], rel=1e-3)
    assert alone["eval_losses"][0] == pytest.approx(alone["eval_losses"][1]) == pytest.approx(alone["eval_losses"][2])
    for name, value in alone["student_side"].items():
        torch.testing.assert_close(first["student_side"][name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_a_stream_of_which_a_rank_gets_no_labels_is_one_large_batch(ranks, tmp_path):
    """What is dispatched has labels throughout; and the ranks agree whether what they evaluate has any."""
    first, second = held_by(ranks / "gaps")
    _, alone = distil_gaps(str(tmp_path), per_device_train_batch_size=8)
    assert first["task_losses"] == pytest.approx(alone["task_losses"], rel=1e-4) and min(alone["task_losses"]) > 0
    assert first["eval_losses"] == second["eval_losses"] == pytest.approx(alone["eval_losses"], rel=1e-3)
    for name, value in alone["student_side"].items():
        torch.testing.assert_close(first["student_side"][name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_a_rank_whose_rows_have_no_labels(ranks, tmp_path):
    """What rank 0 reads for both has labels throughout; a loss of one's own waits for no count of labels."""
    first, second = held_by(ranks / "missing")
    assert same(first["student_side"], second["student_side"])
    assert first["task_losses"] == second["task_losses"]
    _, alone = distil_missing(str(tmp_path), per_device_train_batch_size=8)
    dispatched, own = (first["task_losses"][kind] for kind in ("dispatched", "own-loss"))
    assert dispatched == pytest.approx(alone["task_losses"]["dispatched"], rel=1e-4) and min(dispatched) > 0
    assert len(own) == 4 and min(own) > 0


@pytest.mark.slow
def test_the_script_on_two_ranks(tmp_path):
    small = ["--max_train_samples", "64", "--max_eval_samples", "32", "--num_train_epochs", "1"]
    small += ["--paraphraser_epochs", "1", "--teacher", "cifar-resnet-8", "--per_device_train_batch_size", "16"]
    script = str(HERE.parent / "examples" / "run_iekd.py")
    printed = torchrun(script, "--output_dir", str(tmp_path), "--use_cpu", "--disable_tqdm", "true", *small)
    assert printed.count("\ndistilled student ") == 1  # one rank prints
    # 64 images on 2 ranks of 16 are 2 steps.
    assert (tmp_path / "checkpoint-2" / "rng_state_1.pth").is_file()
    _, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())


def test_a_teacher_is_shared_out_over_several_processes_only(make_trainer):
    with pytest.raises(ValueError, match=r"several processes.*leave teacher_sharding out"):
        make_trainer(teacher_sharding="fsdp")
    with pytest.raises(ValueError, match="compile_teacher=False with teacher_sharding"):
        make_trainer(teacher_sharding="fsdp", compile_teacher=True)
    with pytest.raises(ValueError, match="teacher_sharding to be one of fsdp; got 'zero'"):
        make_trainer(teacher_sharding="zero")


def test_blocks_that_are_shared_out():
    vit = make_vit()
    assert _blocks(vit) == [*reversed(vit.vit.layers)]
    resnet = make_resnet(16)
    blocks = _blocks(resnet)
    stage = resnet.resnet.encoder.stages[1]
    assert blocks.index(stage.layers[0]) < blocks.index(stage)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    assert _blocks(tied) == [tied[1]]  # a weight that two blocks share is in no block


@pytest.mark.parametrize("engine", ["FSDP", "DeepSpeed"])
@pytest.mark.parametrize("trainer", ["IEKDTrainer", "MutualTrainer"])
def test_engines_that_shard_are_refused(make_trainer, make_mutual, monkeypatch, engine, trainer):
    monkeypatch.setattr(
        DistillationTrainer,
        "create_accelerator_and_postprocess",
        _pretend(DistillationTrainer.create_accelerator_and_postprocess, engine),
    )
    with pytest.raises(ValueError, match=f"got {engine}: {trainer}.*accelerate launch --multi_gpu"):
        make_trainer() if trainer == "IEKDTrainer" else make_mutual()


@pytest.mark.parametrize("engine", ["FSDP", "DeepSpeed"])
def test_an_engine_that_accelerate_leaves_out_in_silence_is_refused(make_trainer, monkeypatch, engine):
    """On CPU, or in one process, Accelerate does not say that it goes on without."""
    original = DistillationTrainer.create_accelerator_and_postprocess

    def create(self):  # after the arguments, which refuse DeepSpeed where it is not installed
        original(self)
        monkeypatch.setenv(f"ACCELERATE_USE_{engine.upper()}", "true")

    monkeypatch.setattr(DistillationTrainer, "create_accelerator_and_postprocess", create)
    with pytest.raises(ValueError, match=rf"got {engine} \(ACCELERATE_USE_{engine.upper()}\)"):
        make_trainer()


@pytest.mark.slow
def test_fsdp_on_two_cpu_ranks_is_refused(tmp_path):
    (tmp_path / "script.py").write_text(
        "from conftest import make_images, make_resnet\n"
        "from iekd_hf import IEKDTrainer, IEKDTrainingArguments\n"
        f"args = IEKDTrainingArguments({str(tmp_path)!r}, report_to='none', use_cpu=True, fsdp=True)\n"
        "try:\n"
        "    IEKDTrainer(make_resnet(), make_resnet(16), args=args, train_dataset=make_images())\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    assert torchrun(str(tmp_path / "script.py")).count("Expected DDP or one process, got FSDP (") == 2


def _pretend(original, engine):
    def create(self):
        original(self)
        self.is_fsdp_enabled, self.is_deepspeed_enabled = engine == "FSDP", engine == "DeepSpeed"

    return create


def test_data_parallel_is_refused(tmp_path):
    args = IEKDTrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="accelerate launch --num_processes 2"):
        IEKDTrainer(model=make_resnet(), teacher_model=make_resnet(), args=args, train_dataset=make_images())
