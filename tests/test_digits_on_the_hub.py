"""The whole way: digits from a data set repository, a distilled student to the Hub, and a stranger who uses it."""

import io
import json
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
from conftest import ROOT, Client, make_resnet
from hub_server import HubServer, card_errors
from sklearn.datasets import load_digits
from transformers import ViTImageProcessorPil


EXAMPLE = f"""
import sys
sys.path.insert(0, {str(ROOT / "examples")!r})
import run_iekd
sys.argv = ["run_iekd.py", *sys.argv[1:]]
run_iekd.main()
print("{{}}")
"""

USE = """
import datasets, json
from huggingface_hub import ModelCard
from transformers import pipeline
images = datasets.load_dataset("user/digits", split="validation")
predict = pipeline("image-classification", model="user/student")
answers = predict([row["image"] for row in images], top_k=1)
correct = [answer[0]["label"] == str(row["label"]) for answer, row in zip(answers, images)]
data = ModelCard.load("user/student").data
print(json.dumps({"accuracy": sum(correct) / len(correct), "card": data.to_dict()}))
"""


def digits_as_parquet() -> dict[str, bytes]:
    digits = load_digits()
    names = datasets.ClassLabel(names=[str(n) for n in range(10)])
    features = datasets.Features({"image": datasets.Image(), "label": names})
    files = {}
    for split, part in (("train", slice(0, 300)), ("validation", slice(300, 400))):
        images = [PIL.Image.fromarray((scan * 255 / 16).astype(np.uint8)) for scan in digits.images[part]]
        rows, buffer = {"image": images, "label": digits.target[part]}, io.BytesIO()
        datasets.Dataset.from_dict(rows, features=features).to_parquet(buffer)
        files[f"data/{split}-00000-of-00001.parquet"] = buffer.getvalue()
    return files


@pytest.fixture
def with_digits(hub: HubServer, tmp_path: Path) -> HubServer:
    """Serve digits, and a student with its processor and licence to start from."""
    hub.repos["datasets/user/digits"] = {"files": digits_as_parquet()}
    start = tmp_path / "start"
    make_resnet(32, num_labels=10, downsample_in_first_stage=False).save_pretrained(start)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(start)
    files = {path.name: path.read_bytes() for path in start.iterdir()}
    hub.repos["user/start"] = {"files": files, "tags": ["license:bsd-3-clause"]}
    return hub


@pytest.mark.slow
def test_digits(with_digits: HubServer, client: Client, tmp_path: Path):
    hub, out = with_digits, tmp_path / "out"
    common = ["--dataset_name", "user/digits", "--push_to_hub"]
    client(
        EXAMPLE,
        hub.endpoint,
        *common,
        *("--student", "user/start", "--teacher", "cifar-resnet-8", "--hub_model_id", "user/student"),
        *("--output_dir", str(out), "--report_to", "tensorboard", "--plain_student", "false"),
        *("--num_train_epochs", "4", "--teacher_epochs", "1", "--paraphraser_epochs", "1", "--learning_rate", "0.05"),
        *("--per_device_train_batch_size", "16"),
    )
    results = json.loads((out / "all_results.json").read_text())
    files = hub.repos["user/student"]["files"]
    assert {"model.safetensors", "preprocessor_config.json", "README.md", "report.png", "trainer_state.json"} <= set(
        files
    )
    assert [path for path in files if path.startswith("runs/")]
    for path, content in files.items():
        assert not path.startswith(("_", "checkpoint-")) and str(tmp_path).encode() not in content, path

    # A stranger, without this library.
    used = client(USE, hub.endpoint, with_library=False)
    data = used["card"]
    assert results["eval_accuracy"] > 0.2  # ten classes
    assert used["accuracy"] == pytest.approx(results["eval_accuracy"], abs=0.021)  # resized by another library
    assert card_errors(files["README.md"].decode()) == []
    assert (data["pipeline_tag"], data["library_name"]) == ("image-classification", "transformers")
    assert (data["base_model"], data["base_model_relation"]) == ("user/start", "finetune")
    assert (data["datasets"], data["license"]) == (["user/digits"], "bsd-3-clause")
    (result,) = data["model-index"][0]["results"]
    assert {metric["type"]: metric["value"] for metric in result["metrics"]} == {
        name: results[f"eval_{name}"] for name in ("accuracy", "top5_accuracy", "macro_f1")
    }
    card = files["README.md"].decode()
    assert "| teacher | `CifarResNetForImageClassification` | 78,042 |" in card
    assert "| size | latency | accuracy |" in card
    assert "![What came of the run](report.png)" in card and " | - |" not in card

    # A script whose push fails ends well all the same.
    hub.failures = {"commit": 403}
    again = tmp_path / "again"
    arguments = [
        "--do_train",
        "false",
        "--student",
        str(out),
        "--output_dir",
        str(again),
        "--hub_model_id",
        "user/again",
    ]
    client(EXAMPLE, hub.endpoint, *common, *arguments)
    assert {"model.safetensors", "README.md"} <= {path.name for path in again.iterdir()}
    assert not hub.repos["user/again"]["files"]
