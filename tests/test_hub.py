"""Push and load by Hub name, against a server on the loopback interface.

The clients are processes of their own: `HF_ENDPOINT` is read when huggingface_hub is imported.
"""

import re
import socket
from pathlib import Path

import pytest
import torch
from conftest import LOGITS, TOKEN, Client
from hub_server import HubServer

from iekd_hf import Paraphraser


# The token and the models' folders are given where they could leak: in the arguments and in `_name_or_path`.
TRAIN_AND_PUSH = """
import os, sys
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil
from iekd_hf import IEKDTrainer, IEKDTrainingArguments

def resnet(width, folder):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, width], depths=[1, 1], layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(folder)
    return folder

torch.manual_seed(0)
folder = sys.argv[1]
images = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 2} for i in range(8)]
trainer = IEKDTrainer(
    model=resnet(16, folder + "/student"),
    teacher_model=resnet(32, folder + "/teacher"),
    args=IEKDTrainingArguments(
        folder + "/out",
        max_steps=2,
        save_steps=1,
        learning_rate=0.1,
        paraphraser_epochs=1,
        report_to="none",
        push_to_hub=True,
        hub_model_id="user/student",
        hub_token=os.environ["HF_TOKEN"],
    ),
    train_dataset=images,
    eval_dataset=images,
    processing_class=ViTImageProcessorPil(size={"height": 32, "width": 32}),
)
before = logits(trainer.student)
trainer.train()
trainer.push_to_hub()
print(json.dumps({"before": before, "after": logits(trainer.student), "local": os.listdir(folder + "/out")}))
"""

LOAD_STUDENT = """
from transformers import AutoImageProcessor, AutoModelForImageClassification
model, info = AutoModelForImageClassification.from_pretrained("user/student", output_loading_info=True)
info = {name: sorted(map(str, info[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
processor = AutoImageProcessor.from_pretrained("user/student", backend="pil")
print(json.dumps({"class": type(model).__name__, "info": info, "size": dict(processor.size), "logits": logits(model)}))
"""


def test_trainer_pushes_the_plain_student(hub: HubServer, client: Client, tmp_path: Path):
    pushed = client(LOGITS + TRAIN_AND_PUSH, hub.endpoint, str(tmp_path))
    files = hub.repos["user/student"]["files"]

    # What must not be pushed was there to be pushed.
    assert {"_paraphraser", "checkpoint-1", "checkpoint-2"} <= set(pushed["local"])
    assert {"model.safetensors", "config.json", "README.md", "preprocessor_config.json"} <= set(files)
    forbidden = ("_paraphraser", "_stage_1", "checkpoint-")
    assert not [path for path in files if path.startswith(forbidden) or "/" in path]
    assert not {"optimizer.pt", "iekd_encoders.safetensors"} & {Path(path).name for path in files}
    card = files["README.md"].decode().split("---")[1]
    assert "- iekd\n" in card and "- knowledge-distillation\n" in card
    for secret in (TOKEN, str(tmp_path)):
        leaks = [path for path, content in files.items() if secret.encode() in content]
        assert not leaks, f"{secret} is in {leaks}"

    # The plain student needs nothing but transformers.
    loaded = client(LOGITS + LOAD_STUDENT, hub.endpoint, with_library=False)
    assert loaded["class"] == "ResNetForImageClassification"
    assert loaded["info"] == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    assert loaded["size"] == {"height": 32, "width": 32}
    assert loaded["logits"] == pushed["after"] != pushed["before"]


TEACH_EACH_OTHER_AND_PUSH = """
import os, sys
from transformers import AutoModelForImageClassification, ViTConfig, ViTImageProcessorPil
from iekd_hf import CifarResNetConfig, MutualTrainer, MutualTrainingArguments

torch.manual_seed(0)
folder = sys.argv[1]
resnet = CifarResNetConfig.from_depth(8, num_labels=2)  # brings its own code
vit = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=8, image_size=32)
for name, config in (("first", resnet), ("second", vit)):
    AutoModelForImageClassification.from_config(config).save_pretrained(f"{folder}/{name}")
images = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 2} for i in range(8)]
trainer = MutualTrainer(
    models=[folder + "/first", folder + "/second"],
    args=MutualTrainingArguments(
        folder + "/out",
        max_steps=2,
        save_steps=1,
        learning_rate=0.1,
        report_to="none",
        push_to_hub=True,
        hub_model_id="user/peers",
        hub_token=os.environ["HF_TOKEN"],
    ),
    train_dataset=images,
    eval_dataset=images,
    processing_class=ViTImageProcessorPil(size={"height": 32, "width": 32}),
)
trainer.train()
pushed_while_training = sorted(os.listdir(folder + "/out"))
trainer.push_to_hub(tags="classroom")
print(json.dumps({"logits": [logits(model) for model in trainer.models], "local": pushed_while_training}))
"""

LOAD_PEERS = """
from transformers import AutoImageProcessor, AutoModelForImageClassification
result = {}
for name in ("peer_1", "peer_2"):
    model, info = AutoModelForImageClassification.from_pretrained(
        "user/peers", subfolder=name, trust_remote_code=True, output_loading_info=True
    )
    processor = AutoImageProcessor.from_pretrained("user/peers", subfolder=name, backend="pil")
    missing = sorted(map(str, [*info["missing_keys"], *info["unexpected_keys"]]))
    result[name] = [type(model).__name__, missing, dict(processor.size), logits(model)]
print(json.dumps(result))
"""


@pytest.mark.slow
def test_peers_are_pushed_into_one_repository(hub: HubServer, client: Client, tmp_path: Path):
    pushed = client(LOGITS + TEACH_EACH_OTHER_AND_PUSH, hub.endpoint, str(tmp_path))
    assert {"peer_1", "peer_2", "checkpoint-1", "checkpoint-2"} <= set(pushed["local"])
    files = hub.repos["user/peers"]["files"]
    for name in ("peer_1", "peer_2"):
        assert {f"{name}/{file}" for file in ("config.json", "model.safetensors", "preprocessor_config.json")} <= set(
            files
        )
    assert not [
        path for path in files if path.startswith("checkpoint-") or path.endswith(("pt", "encoders.safetensors"))
    ]
    card = files["README.md"].decode()
    for tag in ("iekd", "deep-mutual-learning", "classroom"):
        assert f"- {tag}\n" in card.split("---")[1]
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    for secret in (TOKEN, str(tmp_path)):
        assert not [path for path, content in files.items() if secret.encode() in content]

    size = {"height": 32, "width": 32}
    loaded = client(LOGITS + LOAD_PEERS, hub.endpoint, with_library=False)
    assert loaded["peer_1"] == ["CifarResNetForImageClassification", [], size, pushed["logits"][0]]
    assert loaded["peer_2"] == ["ViTForImageClassification", [], size, pushed["logits"][1]]
    by_card = client(f"{LOGITS}{code}\nprint(json.dumps([logits(peer_1), logits(peer_2)]))", hub.endpoint)
    assert by_card == pushed["logits"]


PUSH_CIFAR = """
from transformers import AutoModelForImageClassification
from iekd_hf import CifarResNetConfig, CifarResNetForImageClassification
model = CifarResNetForImageClassification(CifarResNetConfig.from_depth(8, num_labels=10))
model.push_to_hub("user/cifar")
loaded = AutoModelForImageClassification.from_pretrained("user/cifar")
own = type(loaded) is CifarResNetForImageClassification
print(json.dumps({"own": own, "logits": logits(model), "loaded": logits(loaded)}))
"""

LOAD_CIFAR = """
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained("user/cifar", trust_remote_code=True)
stem = model.resnet.embedder.embedder.convolution
print(json.dumps({"module": type(model).__module__, "stride": stem.stride, "logits": logits(model)}))
"""


@pytest.mark.slow
def test_cifar_resnet_travels_with_its_code(hub: HubServer, client: Client):
    pushed = client(LOGITS + PUSH_CIFAR, hub.endpoint)
    files = hub.repos["user/cifar"]["files"]
    assert {"model.safetensors", "config.json", "modeling_cifar_resnet.py"} <= set(files)
    assert pushed["own"]
    assert pushed["loaded"] == pushed["logits"]

    loaded = client(LOGITS + LOAD_CIFAR, hub.endpoint, with_library=False)
    assert loaded["module"].startswith("transformers_modules.")
    assert loaded["stride"] == [1, 1]
    assert loaded["logits"] == pushed["logits"]


PUSH_PARAPHRASER = """
import json, torch
from transformers import ResNetConfig, ResNetForImageClassification
from iekd_hf import IEKDTrainer, IEKDTrainingArguments, Paraphraser

def resnet(width):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, width], depths=[1, 1], layer_type="basic")
    return ResNetForImageClassification(config)

paraphraser = Paraphraser(64, 32)
f_T = torch.randn(2, 64, 8, 8)
with torch.no_grad():
    paraphraser(f_T)  # moves the statistics of BatchNorm, which must be pushed too
    paraphraser.push_to_hub("user/paraphraser")
    loaded = Paraphraser.from_pretrained("user/paraphraser")
    difference = (loaded.eval().encode(f_T) - paraphraser.eval().encode(f_T)).abs().max().item()
    spread = paraphraser.encode(f_T).std().item()

images = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 2} for i in range(8)]
trainer = IEKDTrainer(
    model=resnet(16),
    teacher_model=resnet(64),
    args=IEKDTrainingArguments("out", max_steps=1, report_to="none"),
    train_dataset=images,
    paraphraser="user/paraphraser",
)
metrics = trainer.train().metrics
state, used = (p.encoder.state_dict() for p in (paraphraser, trainer.teacher.paraphrasers[0]))
print(json.dumps({
    "difference": difference,
    "spread": spread,
    "same_weights": all(torch.equal(state[name], used[name]) for name in state),
    "stage_1": [name for name in metrics if name.startswith("paraphraser_")],
}))
"""


def test_paraphraser_is_pushed_and_loaded(hub: HubServer, client: Client):
    result = client(PUSH_PARAPHRASER, hub.endpoint)
    files = hub.repos["user/paraphraser"]["files"]
    assert {"model.safetensors", "config.json", "README.md"} == set(files)
    assert b'Paraphraser.from_pretrained("user/paraphraser")' in files["README.md"]
    assert result["difference"] == 0 < result["spread"]
    assert result["same_weights"]
    assert not result["stage_1"]  # a paraphraser that is given is not trained


LOAD_NOTHING = """
import json, sys, time
from iekd_hf.models.loading import load_model
start = time.monotonic()
try:
    load_model(sys.argv[1], "teacher_model")
    raised = message = None
except Exception as error:
    raised, message = type(error).__name__, str(error)
print(json.dumps({"raised": raised, "message": message, "seconds": time.monotonic() - start}))
"""


def check_explained(result: dict, name: str) -> None:
    assert result["raised"] == "ValueError", result
    for part in (name, "teacher_model", "HF_HUB_CACHE", "local folder"):
        assert part in result["message"]


@pytest.mark.slow
def test_name_that_does_not_exist(hub: HubServer, client: Client):
    check_explained(client(LOAD_NOTHING, hub.endpoint, "user/absent"), "user/absent")


@pytest.mark.slow
def test_hub_that_cannot_be_reached(client: Client):
    with socket.socket() as taken:
        # Bound but not listening: connections are refused, and no other process can come to listen there.
        taken.bind(("127.0.0.1", 0))
        result = client(LOAD_NOTHING, f"http://127.0.0.1:{taken.getsockname()[1]}", "user/teacher")
    check_explained(result, "user/teacher")
    assert result["seconds"] < 45


LOAD_PICKLES = """
import json, sys
from iekd_hf import Paraphraser
from iekd_hf.training.checkpoints import load_paraphrasers

def attempt(load):
    try:
        load()
        return None
    except Exception as error:
        return [type(error).__name__, str(error)]

print(json.dumps({name: {
    "from_pretrained": attempt(lambda: Paraphraser.from_pretrained(name)),
    "trainer": attempt(lambda: load_paraphrasers(name, 1)),
} for name in sys.argv[1:]}))
"""


@pytest.mark.slow
def test_pickled_paraphraser_is_refused(hub: HubServer, client: Client, tmp_path: Path):
    folder = tmp_path / "pickled"
    paraphraser = Paraphraser(8, 4)
    paraphraser.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(paraphraser.state_dict(), folder / "pytorch_model.bin")  # harmless and complete: it would load
    hub.repos["user/pickled"] = {"files": {path.name: path.read_bytes() for path in folder.iterdir()}}

    result = client(LOAD_PICKLES, hub.endpoint, "user/pickled", str(folder))
    for name, errors in result.items():
        for entry, error in errors.items():
            assert error is not None, f"{entry} has loaded {name}"
            assert error[0] == "ValueError", (name, entry, error)
            assert "safetensors" in error[1]
