"""
Train on a stream of tar files in WebDataset's layout, and on the same images from one parquet file: images a second of
the process's own time, and the memory that it holds on the way.

    python examples/benchmarks/streams.py --output_dir streams --num_images 100000

Both read image by image, in a process and on a thread of their own, with a network that takes little time itself.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import torch
from speed_cases import memory, tiny_setting
from transformers import TrainerCallback

from iekd_hf import IEKDTrainer, IEKDTrainingArguments


IMAGES_PER_TAR, BATCH_SIZE, SIDE = 5000, 128, 32
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)
PATHS = {"parquet": "one parquet file, shuffled whole", "tars": "tar files, shuffled in a buffer of 1,000"}


def jpegs(count: int) -> list[bytes]:
    """Make some images, of noise in blocks of four pixels."""
    made = []
    for noise in np.random.default_rng(0).integers(0, 256, (count, SIDE // 4, SIDE // 4, 3), dtype=np.uint8):
        file = io.BytesIO()
        PIL.Image.fromarray(noise).resize((SIDE, SIDE)).save(file, "JPEG")
        made.append(file.getvalue())
    return made


def write_images(folder: Path, num_images: int) -> None:
    """Write the same images as tar files and as a parquet file."""
    different = jpegs(256)
    for first in range(0, num_images, IMAGES_PER_TAR):
        with tarfile.open(folder / f"{first // IMAGES_PER_TAR:05d}.tar", "w") as tar:
            for i in range(first, min(first + IMAGES_PER_TAR, num_images)):
                for suffix, content in (("jpg", different[i % 256]), ("cls", str(i % 10).encode())):
                    member = tarfile.TarInfo(f"{i:07d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    rows = {"jpg": [{"bytes": different[i % 256], "path": None} for i in range(num_images)]}
    features = datasets.Features(jpg=datasets.Image(), cls=datasets.Value("int64"))
    rows = datasets.Dataset.from_dict({**rows, "cls": [i % 10 for i in range(num_images)]}, features=features)
    rows.to_parquet(folder / "images.parquet")


def read_row(row: dict) -> dict:
    """Make what the student takes."""
    pixels = torch.from_numpy(np.asarray(row["jpg"].convert("RGB")).copy()).permute(2, 0, 1)
    return {"pixel_values": pixels.float() / 127.5 - 1, "labels": int(row["cls"])}


def read_rows(rows: dict) -> dict:
    """Make it of several."""
    examples = [read_row({name: values[i] for name, values in rows.items()}) for i in range(len(rows["cls"]))]
    return {name: [example[name] for example in examples] for name in examples[0]}


def open_images(path: str, folder: Path) -> datasets.Dataset | datasets.IterableDataset:
    """Open the images in one of both ways."""
    files = {"split": "train", "cache_dir": str(folder / "cache")}
    if path == "tars":
        tars = datasets.load_dataset("webdataset", data_files=str(folder / "*.tar"), streaming=True, **files)
        return tars.map(read_row).shuffle(seed=0, buffer_size=1000)
    rows = datasets.load_dataset("parquet", data_files=str(folder / "images.parquet"), **files)
    return rows.with_transform(read_rows)


class Watch(TrainerCallback):
    """Note time and memory while stage 2 goes on."""

    def __init__(self):
        self.begun, self.noted = 0.0, []

    def on_step_end(self, args, state, control, **kwargs):
        """Begin with the second step, when all that is made once has been made."""
        if args.output_dir.endswith("_stage_1"):
            return
        if state.global_step == 1:
            self.begun = time.process_time()
        if state.global_step in [round(share * state.max_steps) for share in SHARES]:
            seconds = time.process_time() - self.begun
            self.noted.append({"step": state.global_step, "seconds": seconds, "mebibytes": memory("RssAnon")})


def train(path: str, folder: Path, num_images: int) -> dict:
    """Train on the images once; return what was noted."""
    setting, watch = tiny_setting(), Watch()
    args = IEKDTrainingArguments(
        str(folder / path),
        max_steps=num_images // BATCH_SIZE,
        paraphraser_max_steps=10,
        per_device_train_batch_size=BATCH_SIZE,
        lambda_inh=1000.0,
        lambda_exp=100.0,
        remove_unused_columns=path == "tars",  # a transform makes its columns when they are read
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    images = open_images(path, folder)
    trainer = IEKDTrainer(setting.student, setting.teacher, args, train_dataset=images, callbacks=[watch])
    trainer.train()
    last = watch.noted[-1]
    return {"images_per_second": (last["step"] - 1) * BATCH_SIZE / last["seconds"], "noted": watch.noted}


def table(measured: dict) -> str:
    """Lay out what was measured in Markdown."""
    steps = [noted["step"] for noted in next(iter(measured.values()))["noted"]]
    titles = ["images", "images/s", *(f"MiB after {step * BATCH_SIZE:,}" for step in steps)]
    lines = ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]
    for path, of_path in measured.items():
        memory = [f"{noted['mebibytes']:,.0f}" for noted in of_path["noted"]]
        lines.append("| " + " | ".join([PATHS[path], f"{of_path['images_per_second']:,.0f}", *memory]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("streams"), help="Where images and results are.")
    parser.add_argument("--num_images", type=int, default=100_000, help="How many images.")
    parser.add_argument("--only", choices=list(PATHS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(train(options.only, options.output_dir, options.num_images)))
        return
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_images(options.output_dir, options.num_images)
    measured = {}
    for path in PATHS:
        command = [sys.executable, __file__, "--output_dir", str(options.output_dir)]
        command += ["--num_images", str(options.num_images), "--only", path]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        measured[path] = json.loads(done.stdout.splitlines()[-1])
        (options.output_dir / "streams.json").write_text(json.dumps(measured, indent=1) + "\n")
    print(table(measured))


if __name__ == "__main__":
    main()
