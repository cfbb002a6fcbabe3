"""Models by name: which revision, as whom, in which type, and whose code runs."""

import functools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import hub_server
import pytest
import torch
from conftest import make_images, make_resnet
from hub_server import HubServer
from transformers import AutoImageProcessor, SamImageProcessorPil, SamProcessor, ViTImageProcessorPil

from iekd_hf.models.loading import find_processor, load_model


ROOT = Path(__file__).parent.parent
TOKEN = "hf_reader"

LOAD = """
import json, sys
from iekd_hf import IEKDTrainer, IEKDTrainingArguments
kwargs = json.loads(sys.argv[1])
try:
    trainer = IEKDTrainer(
        model="user/student",
        teacher_model="user/teacher",
        model_init_kwargs={**kwargs, "dtype": "bfloat16"},
        teacher_model_init_kwargs=kwargs,
        args=IEKDTrainingArguments("out", report_to="none", use_cpu=True),
    )
    print(json.dumps({"student": str(trainer.student.dtype), "args": trainer.args.to_json_string()}))
except ValueError as error:
    print(json.dumps({"error": str(error)}))
"""


@pytest.mark.slow
def test_revision_and_token_reach_the_hub(tmp_path, monkeypatch):
    """A private repository: without the token nothing is found, with it just the revision that is asked for."""
    seen = []

    def resolve(self, repo, revision, path, original=hub_server._Handler.resolve):
        self._authorize()
        seen.append((repo, revision, path))
        return original(self, repo, revision, path)

    monkeypatch.setattr(hub_server._Handler, "resolve", resolve)
    with HubServer(TOKEN) as hub:
        for name, width in (("student", 8), ("teacher", 16)):
            make_resnet(width, num_labels=2).save_pretrained(tmp_path / name)
            ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / name)
            hub.repos[f"user/{name}"] = {"files": {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}}
        dropped = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_")
        env = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        env |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
        env |= {"HF_HUB_DISABLE_XET": "1", "CUDA_VISIBLE_DEVICES": ""}

        def load(**kwargs) -> dict:
            command = [sys.executable, "-c", LOAD, json.dumps(kwargs)]
            done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-3000:]
            assert TOKEN not in done.stderr
            return json.loads(done.stdout.splitlines()[-1])

        assert "'user/teacher', which is no folder here and could not be fetched" in load()["error"]
        assert not seen
        for repository in hub.repos.values():  # a commit of that name; `main` must not be asked for
            repository["history"] = {"0123456789" * 4: repository["files"]}
        loaded = load(token=TOKEN, revision="0123456789" * 4)
        assert loaded["student"] == "torch.bfloat16" and TOKEN not in loaded["args"]
        assert {revision for _, revision, _ in seen} == {"0123456789" * 4}
        read = {(repo, path) for repo, _, path in seen}
        wanted = {("user/teacher", "preprocessor_config.json")}
        wanted |= {
            (f"user/{name}", f) for name in ("student", "teacher") for f in ("config.json", "model.safetensors")
        }
        assert wanted <= read


def test_a_student_is_loaded_in_float32_a_teacher_as_it_is(make_trainer, tmp_path):
    for name, width in (("student", 8), ("teacher", 16)):
        make_resnet(width).to(torch.bfloat16).save_pretrained(tmp_path / name)
    folders = {"model": str(tmp_path / "student"), "teacher_model": str(tmp_path / "teacher")}
    trainer = make_trainer(**folders)
    assert (trainer.student.dtype, trainer.teacher.dtype) == (torch.float32, torch.bfloat16)
    trainer.train()
    trainer = make_trainer(
        **folders,
        model_init_kwargs={"torch_dtype": torch.bfloat16},  # the older name
        teacher_model_init_kwargs={"dtype": "float32"},
        train_dataset=[{**image, "pixel_values": image["pixel_values"].bfloat16()} for image in make_images()],
    )
    assert (trainer.student.dtype, trainer.teacher.dtype) == (torch.bfloat16, torch.float32)


def test_the_scripts_load_in_float32_too(tmp_path):
    from iekd_hf.commands.images.run import build_model

    make_resnet(8).to(torch.bfloat16).save_pretrained(tmp_path)
    build = functools.partial(build_model, str(tmp_path), "--student", ["ant", "bee", "cat"], trust_remote_code=False)
    assert build(from_scratch=False).dtype == build(from_scratch=True).dtype == torch.float32
    assert build(from_scratch=False, dtype="auto", revision="main", token=None).dtype == torch.bfloat16


def test_keywords_for_a_model_that_is_there_are_refused(make_trainer, tmp_path):
    for name in ("model", "teacher_model"):
        with pytest.raises(ValueError, match=rf"{name} as a Hub id or folder with {name}_init_kwargs, got ResNetFor"):
            make_trainer(**{f"{name}_init_kwargs": {"revision": "v1"}})
    assert not (tmp_path / "out").exists()


CODE = """
import pathlib
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

pathlib.Path("{marker}").write_text("code of the repository has run")

class OwnConfig(PreTrainedConfig):
    model_type = "own-network"

class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "body"
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.body = nn.Conv2d(3, 8, 3, 2)
        self.head = nn.Linear(8, config.num_labels)
        self.post_init()

    def forward(self, pixel_values, labels=None):
        logits = self.head(self.body(pixel_values).mean(dim=(2, 3)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)
"""


@pytest.fixture
def with_code(tmp_path):
    """Save a model whose repository holds its code, which leaves a mark when it is imported."""
    from safetensors.torch import save_file

    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "network.py").write_text(CODE.replace("{marker}", str(tmp_path / "mark")))
    auto_map = {"AutoConfig": "network.OwnConfig", "AutoModelForImageClassification": "network.OwnModel"}
    labels = {"id2label": {i: f"LABEL_{i}" for i in range(3)}, "label2id": {f"LABEL_{i}": i for i in range(3)}}
    config = {"model_type": "own-network", "architectures": ["OwnModel"], "auto_map": auto_map, **labels}
    (folder / "config.json").write_text(json.dumps(config))
    sizes = {"body.weight": (8, 3, 3, 3), "body.bias": (8,), "head.weight": (3, 8), "head.bias": (3,)}
    save_file({n: torch.randn(s) for n, s in sizes.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_code_of_a_repository_runs_only_if_asked(make_trainer, tmp_path, with_code, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked on the terminal"))
    for name in ("model", "teacher_model"):
        with pytest.raises(ValueError, match=rf"{name} without code of its own, got .*set trust_remote_code"):
            make_trainer(**{name: str(with_code)})
    assert not (tmp_path / "mark").exists()
    trainer = make_trainer(teacher_model=str(with_code), teacher_model_init_kwargs={"trust_remote_code": True})
    assert (tmp_path / "mark").exists()
    trainer.train()
    assert type(trainer.teacher.teacher).__name__ == "OwnModel"


def test_code_of_a_model_without_a_head(with_code):
    """It is known to `AutoModel` alone."""
    config = json.loads((with_code / "config.json").read_text())
    config["auto_map"]["AutoModel"] = config["auto_map"].pop("AutoModelForImageClassification")
    (with_code / "config.json").write_text(json.dumps(config))
    assert type(load_model(str(with_code), "teacher_model", trust_remote_code=True)).__name__ == "OwnModel"


def test_code_in_the_script(run_example, tmp_path, with_code):
    import run_iekd

    common = ["--output_dir", tmp_path / "out", "--max_train_samples", 32, "--max_eval_samples", 16, "--use_cpu"]
    common += ["--num_train_epochs", 1, "--paraphraser_epochs", 1, "--plain_student", "false", "--image_size", 16]
    for role in ("--teacher", "--student"):
        with pytest.raises(ValueError, match=rf"{role} without code of its own, got .*set trust_remote_code"):
            run_example(run_iekd, *common, role, with_code)
    assert not (tmp_path / "mark").exists()


def test_a_processor_in_a_subfolder(tmp_path):
    make_resnet(8).save_pretrained(tmp_path / "peer_1")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "peer_1")
    assert find_processor(str(tmp_path)) is None
    assert find_processor(str(tmp_path), subfolder="peer_1").size["height"] == 32
    model = load_model(str(tmp_path), "model", subfolder="peer_1")
    assert model(make_images(1)[0]["pixel_values"][None]).logits.shape == (1, 3)


def test_an_image_processor_within_one_of_several_inputs(tmp_path):
    """Saved by Transformers 5, it is in processor_config.json alone."""
    SamProcessor(SamImageProcessorPil(image_mean=[0.1, 0.2, 0.3])).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["processor_config.json"]
    assert list(find_processor(str(tmp_path)).image_mean) == [0.1, 0.2, 0.3]
    (tmp_path / "processor_config.json").write_text('{"processor_class": "SamProcessor"}')
    assert find_processor(str(tmp_path)) is None


def test_a_processor_in_timms_configuration(tmp_path, monkeypatch):
    """A repository of timm has no other file for it; Transformers reads it there. A stand-in is read."""
    monkeypatch.setattr(AutoImageProcessor, "from_pretrained", lambda name, **_: f"that of {Path(name).name}")
    (tmp_path / "config.json").write_text('{"architecture": "resnet18", "pretrained_cfg": {"mean": [0.5, 0.5, 0.5]}}')
    assert find_processor(str(tmp_path)) == f"that of {tmp_path.name}"
    (tmp_path / "config.json").write_text('{"architectures": ["ResNetForImageClassification"]}')
    assert find_processor(str(tmp_path)) is None


def test_a_teacher_with_a_processor_beside_a_student_without(make_trainer, tmp_path):
    make_resnet(16, seed=2).save_pretrained(tmp_path / "teacher")
    size = {"size": {"height": 32, "width": 32}}
    ViTImageProcessorPil(image_mean=[0.1] * 3, **size).save_pretrained(tmp_path / "teacher")
    with pytest.warns(
        UserWarning, match="comes with an image processor, but the student's is not known.*pass as proc"
    ):
        assert make_trainer(teacher_model=str(tmp_path / "teacher")).teacher.teacher_pixels is None
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*comes with an image processor")
        trainer = make_trainer(teacher_model=str(tmp_path / "teacher"), processing_class=ViTImageProcessorPil(**size))
    assert trainer.teacher.teacher_pixels is not None
