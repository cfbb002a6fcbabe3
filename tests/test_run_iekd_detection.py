"""The detection script: the whole run in small, other data and models, resuming, evaluation in constant memory."""

import functools
import gc
import json
import re
import shutil
from pathlib import Path

import datasets
import PIL.Image
import pytest
import run_iekd_detection
import torch
from conftest import break_off, make_resnet, same
from detection_case import NAMES, PROCESSOR, make_case, make_trainer
from test_detection_transforms import split_of
from test_distributed import torchrun
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessorPil,
    ResNetConfig,
    RTDetrForObjectDetection,
    TrainerCallback,
)

from iekd_hf.commands.boxes.metrics import CocoDetection
from iekd_hf.commands.boxes.run import build_detector
from iekd_hf.commands.boxes.shapes import make_shapes
from iekd_hf.commands.boxes.tiny_detectors import tiny_config, tiny_detector, tiny_processor
from iekd_hf.commands.boxes.transforms import DetectionImages


QUICK = ["--num_train_epochs", "1", "--paraphraser_epochs", "1", "--teacher", "tiny-rt-detr-8"]
QUICK += ["--student", "tiny-rt-detr-4", "--disable_tqdm", "true", "--use_cpu"]
FEW = ["--max_train_samples", "16", "--max_eval_samples", "6"]


@pytest.fixture
def run(run_example):
    return functools.partial(run_example, run_iekd_detection)


@pytest.mark.slow
def test_the_shapes_from_nothing_to_the_table(run, tmp_path):
    printed = run("--output_dir", tmp_path, *QUICK, *FEW, "--do_predict", "--eval_strategy", "epoch")
    for row in ("teacher", "plain student", "distilled student"):
        assert re.search(rf"^{row} +\d\d\d,\d\d\d +\d+\.\d +\d+\.\d +\d+ +\w", printed, flags=re.MULTILINE), printed
    assert "mAP: COCO's, in percent; images/s: one image at a time, CPU, 1 thread, float32, median" in printed
    assert re.search(r"stage 1 \d+\.\d, stage 2 \d+\.\d", printed)
    assert PIL.Image.open(tmp_path / "detections.png").size[0] > 1000
    student, info = AutoModelForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and student.config.id2label[3] == "cross"
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"]["seed"] == 42 and results["settings"]["inherit_head"]
    assert list(results["models"]) == ["teacher", "plain student", "distilled student"]
    metrics = results["models"]["distilled student"]["metrics"]
    assert {"map", "map_50", "map_75", "map_small", "mar_100", "map_circle", "loss"} <= set(metrics)
    assert json.loads((tmp_path / "eval_results.json").read_text())["eval_map"] == metrics["map"]
    # The saved student, used as anybody would, finds what the run wrote down.
    predictions = json.loads((tmp_path / "predictions.json").read_text())
    row = predictions[0]["image_id"]  # of the data, whatever was drawn from it
    assert {entry["image_id"] for entry in predictions} != set(range(6))
    image = make_shapes(200, seed=1)[row]["image"]
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    with torch.no_grad():
        outputs = student.eval()(**processor(image, return_tensors="pt"))
    (found,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[image.size[::-1]])
    first = [entry for entry in predictions if entry["image_id"] == row]
    torch.testing.assert_close(torch.tensor([entry["score"] for entry in first]), found["scores"], atol=1e-5, rtol=0)
    assert [entry["category"] for entry in first] == [student.config.id2label[i] for i in found["labels"].tolist()]
    boxes = torch.tensor([entry["bbox"] for entry in first])
    torch.testing.assert_close(boxes[:, :2] + boxes[:, 2:], found["boxes"][:, 2:], atol=1e-3, rtol=0)
    with pytest.raises(
        ValueError, match=r"without checkpoints, got .* with checkpoint-2: add --resume_from_checkpoint"
    ):
        run("--output_dir", tmp_path, *QUICK, *FEW)


@pytest.mark.slow
def test_resume_reuses_what_is_finished(run, tmp_path):
    common = ["--output_dir", tmp_path, *QUICK, *FEW, "--num_train_epochs", "2", "--save_total_limit", "5"]
    common += ["--image_size", "32", "32"]
    run(*common)
    finished = AutoModelForObjectDetection.from_pretrained(tmp_path).state_dict()
    teacher = (tmp_path / "_teacher" / "model.safetensors").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "checkpoint-4")
    printed = run(*common, "--resume_from_checkpoint", "true")
    assert (tmp_path / "_teacher" / "model.safetensors").stat().st_mtime_ns == teacher
    assert re.search(r"^teacher .* training", printed, flags=re.MULTILINE)
    assert same(AutoModelForObjectDetection.from_pretrained(tmp_path).state_dict(), finished)
    break_off(tmp_path)
    printed = run(*common, "--resume_from_checkpoint", "true")
    assert (tmp_path / "_teacher" / "model.safetensors").stat().st_mtime_ns == teacher
    assert same(AutoModelForObjectDetection.from_pretrained(tmp_path).state_dict(), finished)
    with pytest.raises(ValueError, match=r"a run that has begun, got .*nothing' without any checkpoint: leave --res"):
        run(*common, "--output_dir", tmp_path / "nothing", "--resume_from_checkpoint", "true")


def make_detr(width=8, **labels):
    torch.manual_seed(width)
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, width], depths=[1, 1], layer_type="basic")
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 9}
    sizes |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return DetrForObjectDetection(DetrConfig(backbone_config=backbone, **sizes, **labels))


@pytest.mark.slow
def test_parquet_yaml_padding_and_saved_models(run, tmp_path):
    """A trained teacher is measured and reused, a student of another family learns from it; images are padded."""
    shapes = make_shapes(24, seed=0, size=64)
    empty = {"image": PIL.Image.new("RGB", (48, 64)), "objects": {"bbox": [], "category": [], "area": []}}
    odd = datasets.Dataset.from_list([empty], features=shapes.features)
    datasets.concatenate_datasets([shapes, odd]).to_parquet(tmp_path / "train.parquet")
    datasets.concatenate_datasets([odd, make_shapes(7, seed=1, size=64)]).to_parquet(tmp_path / "validation.parquet")
    names = dict(enumerate(shapes.features["objects"]["category"].feature.names))
    teacher = tiny_detector("tiny-rt-detr-8", id2label=names)
    teacher.save_pretrained(tmp_path / "teacher")
    tiny_processor(64, 64).save_pretrained(tmp_path / "teacher")
    make_detr().save_pretrained(tmp_path / "student")  # of other classes: gets a new head
    DetrImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(tmp_path / "student")
    recipe = {
        "teacher": str(tmp_path / "teacher"),
        "student": str(tmp_path / "student"),
        "train_file": str(tmp_path / "train.parquet"),
        "validation_file": str(tmp_path / "validation.parquet"),
        "output_dir": str(tmp_path / "out"),
        "num_train_epochs": 1,
        "paraphraser_epochs": 1,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    (tmp_path / "recipe.yaml").write_text("\n".join(f"{name}: {json.dumps(value)}" for name, value in recipe.items()))
    printed = run(tmp_path / "recipe.yaml")
    assert re.search(r"^teacher +[\d,]+ +\d+\.\d +\d+\.\d +\d+ +-$", printed, flags=re.MULTILINE), printed
    assert AutoModelForObjectDetection.from_pretrained(tmp_path / "out").config.id2label == names
    recipe |= {"student": recipe["output_dir"], "output_dir": str(tmp_path / "alone")}
    (tmp_path / "recipe.json").write_text(json.dumps({**recipe, "do_train": False, "image_square_size": 80}))
    assert re.search(r"^student +[\d,]+ +\d", run(tmp_path / "recipe.json"), flags=re.MULTILINE)


def test_predictions_have_the_numbers_of_the_data(run, tmp_path):
    """As COCO's own categories, whose numbers leave some out."""
    numbers = [1, 18, 44, 90]
    rows = [
        {**row, "objects": {**row["objects"], "category": [numbers[c] for c in row["objects"]["category"]]}}
        for row in make_shapes(12, seed=0, size=32)
    ]
    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(tmp_path / "train.parquet")
    names = dict(enumerate(map(str, numbers)))
    tiny_detector("tiny-rt-detr-4", id2label=names).save_pretrained(tmp_path / "student")
    tiny_processor(32, 32).save_pretrained(tmp_path / "student")
    arguments = ["--student", tmp_path / "student", "--train_file", tmp_path / "train.parquet", "--use_cpu"]
    run("--output_dir", tmp_path / "out", *arguments, "--do_train", "false", "--do_eval", "false", "--do_predict")
    predictions = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert {(entry["category_id"], entry["category"]) for entry in predictions} <= {(n, str(n)) for n in numbers}


def test_a_detector_from_scratch_trains_whole(tmp_path):
    """Transformers freezes DETR's backbone, and closes RT-DETR's norms."""
    built = make_detr()
    assert not all(parameter.requires_grad for parameter in built.parameters())
    built.save_pretrained(tmp_path / "detr")
    model = build_detector(str(tmp_path / "detr"), "--student", ["a", "b", "c"], 5, from_scratch=True)
    assert all(parameter.requires_grad for parameter in model.parameters()) and model.config.num_labels == 3
    RTDetrForObjectDetection(tiny_config("tiny-rt-detr-4")).save_pretrained(tmp_path / "rt-detr")
    model = build_detector(str(tmp_path / "rt-detr"), "--student", ["a"], 5, from_scratch=True)
    norms = [module.weight for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert len(norms) > 20 and all((weight == 1).all() for weight in norms)


def test_too_few_queries_are_warned_of(tmp_path, caplog):
    make_detr().save_pretrained(tmp_path)
    build_detector(str(tmp_path), "--student", ["a"], 12, from_scratch=False)
    assert "--student finds at most 9 objects in an image, but some have 12: it will miss the rest" in caplog.text


@pytest.mark.slow
def test_a_classifier_teaches_a_detector(run, tmp_path):
    make_resnet(16, num_labels=5, seed=2).save_pretrained(tmp_path / "teacher")
    arguments = [*QUICK, *FEW, "--teacher", tmp_path / "teacher", "--plain_student", "false"]
    printed = run("--output_dir", tmp_path / "out", *arguments)
    assert re.search(r"^teacher +[\d,]+ +- +- +\d+ +-$", printed, flags=re.MULTILINE), printed
    assert "plain student" not in printed and "distilled student" in printed


def test_help_explains(run, capsys):
    with pytest.raises(SystemExit, match="0"):
        run("--help")
    text = capsys.readouterr().out
    for name in (
        "--teacher",
        "--lambda_inh",
        "--train_file",
        "--image_square_size",
        "--scale_jitter",
        "--push_to_hub",
    ):
        assert re.search(rf"{name}\b", text)
    assert "Distil an object detector" in text


@pytest.mark.slow
def test_what_cannot_be_had(run, tmp_path):
    with pytest.raises(ValueError, match=r"'nobody/nothing', which cannot be loaded.*--train_file"):
        run("--output_dir", tmp_path, "--dataset_name", "nobody/nothing")
    with pytest.raises(ValueError, match=r"--student .*'nobody/nothing'.*HF_HUB_CACHE"):
        run("--output_dir", tmp_path, *QUICK, *FEW, "--student", "nobody/nothing")
    # What the help leaves out.
    with pytest.raises(ValueError, match="Expected no lambda_kd > 0 with a detector"):
        run("--output_dir", tmp_path, *QUICK, *FEW, "--lambda_kd", "1")
    with pytest.raises(ValueError, match="Expected DecodedImages and an augmentation with cache_teacher=True"):
        run("--output_dir", tmp_path, *QUICK, *FEW, "--cache_teacher")
    with pytest.raises(ValueError, match=r"a width of 4, 8, 12, \.\.\., got 'tiny-rt-detr-6'"):
        run("--output_dir", tmp_path, *QUICK, *FEW, "--student", "tiny-rt-detr-6")
    with pytest.raises(ValueError, match=r"takes, got 56x64 pixels \(.*give --image_size multiples of .* 16 in tiny"):
        run("--output_dir", tmp_path, *QUICK, *FEW, "--image_size", "56", "64")
    with pytest.raises(ValueError, match=r"a teacher whose head has weights of the same name and shape .* got ResNet"):
        classifier = ("--teacher", tmp_path / "classifier", "--inherit_head", "true")
        make_resnet(16, num_labels=5).save_pretrained(tmp_path / "classifier")
        run("--output_dir", tmp_path, *QUICK, *FEW, *classifier)
    assert not (tmp_path / "_teacher").exists() and not (tmp_path / "_plain_student").exists()


class TensorsInMemory(TrainerCallback):
    """Count what tensors hold at each step of evaluation."""

    def __init__(self):
        gc.collect()  # what other tests have left
        self.bytes = []

    def on_prediction_step(self, args, state, control, **kwargs):
        # Not of other types: the tensors of a compiler's tracing have no memory, and may have no size.
        tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
        self.bytes.append(sum(tensor.nbytes for tensor in tensors))


def test_evaluation_takes_the_same_memory_however_many_images(tmp_path):
    """And says what the boxes give that the model finds one by one; images without boxes do no harm."""
    model, split, found = make_case(48)
    counter = TensorsInMemory()
    without = DetectionImages(split_of(list(split.images["image"]), [[]] * 48), PROCESSOR)
    trainer = make_trainer(str(tmp_path), model, split, callbacks=[counter], train_dataset=without)
    result = trainer.evaluate()
    assert len(counter.bytes) == 8
    # The last step has no next batch; the maps of one batch alone are 30 KiB.
    assert max(counter.bytes[1:-1]) - min(counter.bytes[1:-1]) < 2048
    expected = metrics_of(found, split)
    assert 0 < expected["map"] < expected["mar_100"] < 1
    for name in ("map", "map_50", "mar_100", "mar_1"):
        assert result[f"eval_{name}"] == pytest.approx(expected[name])
    assert trainer.evaluate()["eval_map"] == result["eval_map"]  # nothing is left of the first time
    trainer.train()
    assert trainer.state.global_step == 2 and all(p.isfinite().all() for p in model.parameters())


def metrics_of(found, split):
    truth = split.truth(list(range(len(split))))
    return CocoDetection(keep_in_memory=True).compute(predictions=found, references=truth, class_names=NAMES)


@pytest.mark.slow
def test_two_ranks_evaluate_each_image_once(tmp_path):
    """47 images are not as many on each rank: one comes twice, and must count once."""
    torchrun(str(Path(__file__).with_name("detection_case.py")), str(tmp_path))
    _, split, found = make_case(47)
    expected = metrics_of(found, split)
    for rank in (0, 1):
        metrics = json.loads((tmp_path / f"rank_{rank}.json").read_text())
        for name in ("map", "map_50", "mar_100", "mar_1"):
            assert metrics[f"eval_{name}"] == pytest.approx(expected[name], rel=1e-3)
