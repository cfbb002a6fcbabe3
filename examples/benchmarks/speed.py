"""
Time what a step, an epoch, an evaluation and a batch of images cost, and how much memory they take.

    python examples/benchmarks/speed.py --output_dir speed
    python examples/benchmarks/speed.py --output_dir speed-gpu --device cuda

Each section runs in a process of its own, on one thread unless OMP_NUM_THREADS says otherwise; within it all cases
take turns, step by step, and each ratio is the median over the rounds of the ratio to the section's first case, which
is run twice: how far the second time is from 1 says how far to trust the rest. Times are the process's own, or wall
time on a GPU. The table goes to the screen and to speed.md, everything to speed.json, the ratios to speed.png;
sections that were measured earlier stay there.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import matplotlib
import torch
import transformers
from speed_cases import (
    cached_steps,
    cifar_setting,
    compiled_steps,
    data_paths,
    evaluations,
    file_paths,
    fp16_steps,
    half_steps,
    imagenet_setting,
    jpeg_files,
    peak,
    peers_steps,
    photographs,
    steps,
    tiny_setting,
)


matplotlib.use("Agg")
import matplotlib.pyplot as plt


# glibc gives freed activations back to the kernel and faults them in again, which moves times by 3 to 25 %, and has
# another pool of memory for each thread, and the trainers have one each.
MALLOC = {"MALLOC_TRIM_THRESHOLD_": "2000000000", "MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_ARENA_MAX": "1"}
# Where memory is measured, what is freed is given back at once, so that what is held is what is in use.
GIVING_BACK = {"MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


# Name: title, what it is measured on, how, and how many rounds.
CIFAR, IMAGENET = "ResNet-56 -> ResNet-20, 32x32, batch 128", "ResNet-50 -> ResNet-18, 224x224, batch 8"
SECTIONS = {
    "steps": (CIFAR, cifar_setting, steps, 12),
    "bf16": (f"{CIFAR}, bf16", cifar_setting, half_steps, 12),
    "fp16": (f"{CIFAR}, fp16", cifar_setting, fp16_steps, 12),
    "compile": (f"{CIFAR}, bf16, compiled", cifar_setting, compiled_steps, 12),
    "tiny": ("ResNet-8 -> narrow ResNet-8, 28x28, batch 16", tiny_setting, steps, 60),
    "imagenet": (IMAGENET, imagenet_setting, steps, 6),
    "imagenet k=256": (f"{IMAGENET}, factor_channels=256", lambda: imagenet_setting(256), cached_steps, 6),
    "imagenet bf16": (f"{IMAGENET}, bf16", imagenet_setting, half_steps, 6),
    "imagenet fp16": (f"{IMAGENET}, fp16", imagenet_setting, fp16_steps, 6),
    "peers": (f"{CIFAR}, beside others", cifar_setting, peers_steps, 12),
    "imagenet peers": (f"{IMAGENET}, beside others", imagenet_setting, peers_steps, 6),
    "evaluation": ("ResNet-20, 2,048 images of 32x32", cifar_setting, evaluations, 8),
    "imagenet evaluation": ("ResNet-18, 64 images of 224x224", imagenet_setting, evaluations, 6),
    "data": ("images of 32x32, batch 128", cifar_setting, data_paths, 30),
    "imagenet data": ("images of 256x256 to 224x224, batch 128", photographs, data_paths, 6),
    "files": ("JPEG files of about 500x375 to 224x224, batch 32", jpeg_files, file_paths, 12),
    "large files": ("JPEG files of about 1500x1125 to 224x224, batch 32", lambda: jpeg_files(3), file_paths, 6),
}
MEMORY = {"student alone, Trainer": "alone", "bare IE-KD loop": "bare", "IEKDTrainer": "live"}
MEMORY |= {"IEKDTrainer, cached teacher": "cached", "IEKDTrainer, encoder_kernel_size=1": "live 1x1"}
MEMORY |= {"IEKDTrainer, cached teacher, encoder_kernel_size=1": "cached 1x1"}
PLACES = {"cifar": CIFAR, "imagenet": IMAGENET}


def in_a_process(argument: str, malloc: dict[str, str]) -> dict:
    """Run one section by itself."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **malloc}
    command = [sys.executable, __file__, "--only", argument]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_times(name: str) -> dict:
    """Return the section of that name."""
    cases = [{"name": case, **numbers} for case, numbers in in_a_process(name, MALLOC).items()]
    return {name: {"title": SECTIONS[name][0], "cases": cases}}


def measure_memory() -> dict:
    """Return the sections of peak memory."""
    sections = {}
    for place, title in PLACES.items():
        cases = [{"name": case, **in_a_process(f"{place}:{key}", GIVING_BACK)} for case, key in MEMORY.items()]
        cases = [{**case, "ratio": case["mebibytes"] / cases[0]["mebibytes"]} for case in cases]
        sections[f"memory {place}"] = {"title": f"peak memory over imports, {title}", "cases": cases}
    return sections


def machine(device: str) -> str:
    """Say what was measured on: a GPU, or the CPU beside it."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, {versions}"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line.split(": ")[1].split() for line in lines if line.startswith("flags")), [])
    wanted = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if flag in flags]
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    return f"{name} ({' '.join(wanted)}), {threads} thread, {versions}"


def table(sections: dict) -> str:
    """Lay the results out in Markdown."""
    lines, of = [], None
    for section in sections.values():
        if section["machine"] != of:  # sections that were measured earlier may be of another one
            of = section["machine"]
            lines += ["", of]
        unit = next(name for name in ("mebibytes", "images_per_second", "milliseconds") if name in section["cases"][0])
        heading = {"mebibytes": "MiB", "images_per_second": "images/s", "milliseconds": "ms"}[unit]
        lines += ["", f"| {section['title']} | {heading} | ratio | range |", "|---|---:|---:|---|"]
        for case in section["cases"]:
            spread = f"{case['lowest']:.3f} to {case['highest']:.3f}" if "lowest" in case else ""
            digits = 1 if case[unit] < 100 else 0
            lines.append(f"| {case['name']} | {case[unit]:,.{digits}f} | {case['ratio']:.3f} | {spread} |")
    return "\n".join(lines).lstrip()


def draw(sections: dict, path: Path) -> None:
    """Draw the ratios as bars, a picture for each section."""
    sections = list(sections.values())
    heights = [len(section["cases"]) + 1 for section in sections]
    figure, axes = plt.subplots(
        len(sections),
        figsize=(10, 0.32 * sum(heights) + 0.5 * len(sections)),
        gridspec_kw={"height_ratios": heights},
        constrained_layout=True,
        squeeze=False,
    )
    for axis, section in zip(axes[:, 0], sections, strict=True):
        names, ratios = zip(*((case["name"], case["ratio"]) for case in section["cases"]), strict=True)
        axis.bar_label(axis.barh(names, ratios, color="C0"), [f"{ratio:.2f}" for ratio in ratios], padding=4)
        axis.set_title(section["title"], fontsize="medium", loc="left")
        axis.axvline(1, color="black", linewidth=0.5)
        axis.invert_yaxis()
        axis.margins(x=0.1)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*SECTIONS, "memory"]
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="Where. Sections in fp16 are for GPUs. Default: cuda where there is one.",
    )
    parser.add_argument(
        "--sections", nargs="+", choices=names, metavar="SECTION", help=f"Default: all. {', '.join(names)}."
    )
    parser.add_argument("--output_dir", type=Path, default=Path("speed"))
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here.")
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # of the sections' processes
    if options.only:
        torch.manual_seed(0)
        if ":" in options.only:
            print(json.dumps(peak(options.only)))
        else:
            _, make_setting, measure, rounds = SECTIONS[options.only]
            print(json.dumps(measure(make_setting(), rounds)))
        return
    options.output_dir.mkdir(parents=True, exist_ok=True)
    written = options.output_dir / "speed.json"
    sections = json.loads(written.read_text())["sections"] if written.is_file() else {}
    for name in options.sections or [n for n in names if options.device == "cuda" or "fp16" not in n]:
        print(f"{name} ...", file=sys.stderr, flush=True)
        measured = measure_memory() if name == "memory" else measure_times(name)
        sections |= {key: {"machine": machine(options.device), **section} for key, section in measured.items()}
        order = [*SECTIONS, *(f"memory {place}" for place in PLACES)]
        sections = {key: sections[key] for key in order if key in sections}
        written.write_text(json.dumps({"sections": sections}, indent=2) + "\n")
        (options.output_dir / "speed.md").write_text(table(sections) + "\n")
        draw(sections, options.output_dir / "speed.png")
    print(table(sections))


if __name__ == "__main__":
    main()
