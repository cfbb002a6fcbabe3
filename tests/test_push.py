"""Pushes while training and after it: each strategy, and each way to fail."""

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import LOGITS, TOKEN, Client
from hub_server import HubServer


# A trainer on random images; the folders' names are absolute, as what must not leak.
TRAINER = """
import logging, os, sys, urllib.request
from transformers import ResNetConfig, ResNetForImageClassification, TrainerCallback, ViTImageProcessorPil
from iekd_hf import IEKDTrainer, IEKDTrainingArguments, MutualTrainer, MutualTrainingArguments

folder = sys.argv[1]
images = [{"pixel_values": torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(i)), "labels": i % 2}
          for i in range(8)]

def resnet(width):
    torch.manual_seed(width)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, width], depths=[1, 1], layer_type="basic")
    return ResNetForImageClassification(config)

def make(name, trainer_class=IEKDTrainer, callbacks=None, **kwargs):
    defaults = {
        "max_steps": 2, "save_steps": 1, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
        "load_best_model_at_end": True, "learning_rate": 0.1, "report_to": "none", "disable_tqdm": True,
        "per_device_train_batch_size": 4, "hub_model_id": f"user/{name}",
    }
    common = {
        "train_dataset": images, "eval_dataset": images, "callbacks": callbacks,
        "processing_class": ViTImageProcessorPil(size={"height": 32, "width": 32}),
        "compute_metrics": lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    }
    if trainer_class is MutualTrainer:
        args = MutualTrainingArguments(f"{folder}/{name}", **(defaults | kwargs))
        return MutualTrainer([resnet(16), resnet(24)], args=args, **common)
    args = IEKDTrainingArguments(f"{folder}/{name}", paraphraser_epochs=1, **(defaults | kwargs))
    return IEKDTrainer(model=resnet(16), teacher_model=resnet(32), args=args, **common)

def fail(**failures):
    data = json.dumps(failures).encode()
    urllib.request.urlopen(urllib.request.Request(os.environ["HF_ENDPOINT"] + "/failures", data), timeout=60)
"""


def check_nothing_leaks(hub: HubServer, tmp_path: Path) -> None:
    """No file of any repository holds the token, a path of this machine, or what is not the student's."""
    for repo in hub.repos:
        for files in hub.branches(repo).values():
            for path, data in files.items():
                assert TOKEN.encode() not in data, (repo, path)
                assert str(tmp_path).encode() not in data, (repo, path)
                assert not path.startswith("_"), (repo, path)


STRATEGIES = """
for strategy in ("end", "every_save", "checkpoint", "all_checkpoints"):
    trainer = make(strategy, push_to_hub=True, hub_strategy=strategy, hub_always_push=True, report_to="tensorboard",
                   hub_token=os.environ["HF_TOKEN"])
    trainer.train()
    trainer.save_state()
after_training = json.loads(urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/listing").read())
trainer.push_to_hub()

mutual = make("peers", MutualTrainer, push_to_hub=True, hub_strategy="checkpoint", hub_always_push=True)
mutual.train()
private = make("private", push_to_hub=True, hub_private_repo=True, hub_revision="experiments/first")
private.train()
private.push_to_hub(teacher_metrics={"accuracy": 0.25}, license="mit")
private.push_to_hub(revision="second")
print(json.dumps({
    "after_training": after_training,
    "left": [name for name in ("checkpoint", "all_checkpoints") for _ in os.scandir(f"{folder}/{name}/_push")],
    "logits": logits(private.student),
}))
"""

LOAD_PRIVATE = """
import os
from transformers import AutoModelForImageClassification
def attempt(**kwargs):
    try:
        return logits(AutoModelForImageClassification.from_pretrained("user/private", **kwargs))
    except (OSError, ValueError) as error:
        return str(error)
print(json.dumps({
    "branch": attempt(revision="experiments/first"),
    "second": attempt(revision="second"),
    "main": attempt(),
    "stranger": attempt(revision="second", token="hf_other", force_download=True),
}))
"""


@pytest.mark.slow
def test_strategies_revisions_and_private_repositories(hub: HubServer, client: Client, tmp_path: Path):
    result = client(LOGITS + TRAINER + STRATEGIES, hub.endpoint, str(tmp_path))
    pushed = {name.removeprefix("user/"): set(files) for name, files in result["after_training"].items()}
    student = {"config.json", "model.safetensors", "preprocessor_config.json", "training_args.bin"}
    assert not pushed["end"]
    assert student <= pushed["every_save"]
    assert not [path for path in pushed["every_save"] - student if not path.startswith("runs/")]
    # Checkpoints are there to be resumed from: with the optimizer, the encoders and the paraphraser they belong to.
    whole = {
        *student,
        "iekd_encoders.safetensors",
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "trainer_state.json",
        "manifest.json",
        *(f"_paraphraser/{name}" for name in ("README.md", "config.json", "manifest.json", "model.safetensors")),
    }
    for strategy, folders in (
        ("checkpoint", ["last-checkpoint"]),
        ("all_checkpoints", ["checkpoint-1", "checkpoint-2"]),
    ):
        nested = {f"{folder}/{name}" for folder in folders for name in whole}
        assert nested == {path for path in pushed[strategy] - student if not path.startswith("runs/")}, strategy
    assert result["left"] == []
    # A repository that has checkpoints keeps them when the result comes.
    files = hub.repos["user/all_checkpoints"]["files"]
    assert "checkpoint-1/optimizer.pt" in files and "README.md" in files
    for folder in ("", "checkpoint-2/"):
        assert json.loads(files[f"{folder}trainer_state.json"])["best_model_checkpoint"] in (
            "checkpoint-1",
            "checkpoint-2",
        )
    peers = set(hub.repos["user/peers"]["files"])
    for name in ("peer_1", "peer_2"):
        assert {f"{name}/model.safetensors", f"last-checkpoint/{name}/model.safetensors"} <= peers
    assert "last-checkpoint/iekd_encoders.safetensors" in peers
    check_nothing_leaks(hub, tmp_path)

    private = hub.repos["user/private"]
    assert private["private"] and not private["files"]
    assert set(private["branches"]) == {"experiments/first", "second"}
    loaded = client(LOGITS + LOAD_PRIVATE, hub.endpoint, with_library=False)
    assert loaded["branch"] == loaded["second"] == result["logits"]
    assert "user/private" in loaded["main"] and "user/private" in loaded["stranger"]


STOP_IN_THE_MIDDLE = """
class Stop(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = True

settings = {"max_steps": 6, "save_steps": 3, "eval_strategy": "no", "load_best_model_at_end": False}
whole = make("whole", **settings)
whole.train()
make("half", callbacks=[Stop()], push_to_hub=True, hub_strategy="checkpoint", **settings).train()
print(json.dumps({"logits": logits(whole.student)}))
"""

RESUME_ELSEWHERE = """
from huggingface_hub import snapshot_download
checkpoint = snapshot_download("user/half", allow_patterns="last-checkpoint/*") + "/last-checkpoint"
resumed = make("elsewhere", max_steps=6, save_steps=3, eval_strategy="no", load_best_model_at_end=False)
resumed.train(resume_from_checkpoint=checkpoint)
print(json.dumps({"logits": logits(resumed.student), "steps": resumed.state.global_step}))
"""


@pytest.mark.slow
def test_resume_from_the_hub_is_exact(hub: HubServer, client: Client, tmp_path: Path):
    whole = client(LOGITS + TRAINER + STOP_IN_THE_MIDDLE, hub.endpoint, str(tmp_path))
    resumed = client(LOGITS + TRAINER + RESUME_ELSEWHERE, hub.endpoint, str(tmp_path / "other"))
    assert resumed == {"logits": whole["logits"], "steps": 6}
    check_nothing_leaks(hub, tmp_path)


FAIL = """
import time, transformers
time.sleep = lambda seconds: None  # huggingface_hub tries again, which need not take its time

class Kept(logging.Handler):
    def emit(self, record):
        messages.append(record.getMessage())

messages, results, told = [], {}, {}
transformers.utils.logging.get_logger("iekd_hf.hub.push").addHandler(Kept())
logging.getLogger("transformers").addHandler(Kept())

def collect(name):
    told[name] = [message for message in messages if "push" in message]
    messages.clear()

# Where the Hub refuses the repository, nothing starts.
fail(create=401)
try:
    make("refused", push_to_hub=True)
except ValueError as error:
    results["refused"] = [str(error), os.path.exists(f"{folder}/refused")]

# In the background.
fail()
for name, failures in (("background", {"commit": 403}), ("background_cut", {"lfs_upload": "cut"})):
    trainer = make(name, push_to_hub=True)
    fail(**failures)
    results[name] = trainer.train().global_step
    collect(name)
fail()
results["made_up_for"] = trainer.push_to_hub() is not None

# A tracker that pushes along.
class Tracker(TrainerCallback):
    def on_push_begin(self, args, state, control, **kwargs):
        raise RuntimeError("no such project")

results["tracker"] = make("tracker", callbacks=[Tracker()], push_to_hub=True).train().global_step
collect("tracker")

# At the end.
for name, failures in (
    ("create_401", {"create": 401}),
    ("401", {"preupload": 401}),
    ("403", {"commit": 403}),
    ("500", {"commit": 500}),
    ("cut", {"lfs_upload": "cut"}),
    ("cut_commit", {"commit": "cut"}),
):
    fail()
    trainer = make(name)
    trainer.train()
    messages.clear()
    fail(**failures)
    results[name] = [trainer.push_to_hub(), sorted(os.listdir(f"{folder}/{name}")), logits(trainer.student)]
    collect(name)

# Not waited for.
fail(commit=500)
trainer.push_to_hub(blocking=False).exception()
collect("later")
print(json.dumps({"results": results, "told": told}))
"""


@pytest.mark.slow
def test_pushes_that_fail(hub: HubServer, client: Client, tmp_path: Path):
    result = client(LOGITS + TRAINER + FAIL, hub.endpoint, str(tmp_path))
    results, told = result["results"], result["told"]

    message, exists = results["refused"]
    assert "401" in message and "hf auth login" in message and not exists
    assert results["background"] == results["background_cut"] == results["tracker"] == 2
    assert "no such project" in told["tracker"][0]
    assert "403" in told["background"][0] and "user/background" in told["background"][0]
    assert told["background_cut"] and results["made_up_for"]
    for name, reason in (
        ("create_401", "401"),
        ("401", "401"),
        ("403", "403"),
        ("500", "500"),
        ("cut", "Error"),
        ("cut_commit", "Error"),
    ):
        pushed, local, _ = results[name]
        assert pushed is None, name
        assert {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"} <= set(local), name
        (message,) = told[name]
        assert reason in message and f"hf upload user/{name} " in message, message
        assert f"{hub.endpoint}/lfs/" not in message and TOKEN not in message  # such an address is signed
        assert "model.safetensors" not in hub.repos.get(f"user/{name}", {"files": {}})["files"], name
    assert "500" in told["later"][0]

    # What the message says to run does what the push would have done.
    (command,) = re.findall(r"^ +(hf upload .*)$", told["create_401"][0], flags=re.MULTILINE)
    hub.failures = {}
    program, *arguments = shlex.split(command)
    script = f"import sys, json; from huggingface_hub.cli.hf import main; sys.argv = ['{program}', *{arguments!r}]\n"
    client(script + "try:\n    main()\nexcept SystemExit:\n    pass\nprint('{}')", hub.endpoint)
    files = hub.repos["user/create_401"]["files"]
    assert files["model.safetensors"] == (tmp_path / "create_401" / "model.safetensors").read_bytes()
    assert not [path for path in files if path.startswith(("_", "checkpoint-"))]
    check_nothing_leaks(hub, tmp_path)
