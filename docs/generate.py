"""
Write what is taken from elsewhere: the documents' result tables from JSON files, their arguments from the help of the
fields, and the texts that `iekd-hf COMMAND --help` shows.

    python docs/generate.py          # after new results, or new arguments
    python docs/generate.py --check  # fails where something differs

A table stands between `<!-- table: NAME -->` and `<!-- end table -->`; NAME is a key of `TABLES`.
"""

import argparse
import dataclasses
import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import average_accuracy
import average_detection
import comparison_report
import flowers
import streams
from average_detection import HEAD
from comparison_methods import label
from comparison_report import accuracies, interval, paired
from transformers import TrainingArguments

from iekd_hf import METHODS, IEKDTrainingArguments, MutualTrainingArguments
from iekd_hf.commands.cli import COMMANDS
from iekd_hf.commands.parser import CommandParser


ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "examples" / "benchmarks"
TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end table -->)", flags=re.DOTALL)
LINEAR = "ie-ft,paraphraser_decoder=linear"
FEATURES_FIRST, ADAMW = "od,images=all,labels=none", "optim=adamw_torch,learning_rate=0.001"
PAIR, PEERS = "cifar-resnet-56:cifar-resnet-20", "cifar-resnet-20+cifar-resnet-20"
CONVERGENCE, CONVERGENCE_20 = "cifar10-teacher:cifar-resnet-8", "cifar10-teacher:cifar-resnet-20"
LARGER, SMALL = "cifar-resnet-20:cifar-resnet-56", "cifar-resnet-20:cifar-resnet-8"

# Methods as the results name them, with their weights.
FT, IE_FT = "ft,lambda_inh=1500", "ie-ft,lambda_inh=3000,lambda_exp=300"
IE_FT_KD = f"ie-ft+kd,{IE_FT.split(',', 1)[1]},lambda_kd=1"
IE_DML, IE_DML_100 = "ie-dml,lambda_inh=30,lambda_exp=3", "ie-dml,lambda_inh=100,lambda_exp=10"
DML, DML_03 = "dml,lambda_kl=1", "dml,lambda_kl=0.3"

FT_300 = "ft,lambda_inh=300"
INHERITANCE_500 = "inheritance,lambda_inh=500"
IE_FT_500, INHERITANCE = "ie-ft,lambda_inh=500,lambda_exp=50", "inheritance,lambda_inh=3000"
# Automatic weights by their shares, as compare_methods.py, flowers.py and average_detection.py name them.
AUTO = "ie-ft,lambda_inh=auto,lambda_exp=auto"
AUTO_10 = (AUTO, "ie-ft, auto, auto, shares 10 and 1")
AUTO_1 = (
    f"{AUTO},exploration_share=0.1,inheritance_share=1",
    f"{AUTO},inheritance_share=1,exploration_share=0.1",
    "ie-ft, auto, auto, shares 1 and 0.1",
)
WHERE_WRONG = "ie-ft+kd,lambda_inh=3000,lambda_exp=300,lambda_kd=1e-09"
EXPLORATIONS = {
    INHERITANCE: "inherits alone",
    IE_FT: "explores as in the paper",
    f"{IE_FT},exploration=own": "away from its own other half",
    f"{IE_FT},exploration=centred": "as in the paper, factors centred",
    f"{WHERE_WRONG},exploration=where-wrong": "explores where the teacher is wrong, inherits elsewhere",
    FT: "inherits with all channels (FT)",
    "plain": "plain training",
}

# Arguments that only choose between the paper's text and its released code.
RARE = ("split_mode", "loss_reduction", "paraphraser_decoder", "reconstruction_distance", "logging_nan_inf_filter")


def results(name: str) -> list | dict:
    """Read a file of measured results."""
    return json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())


def rows_to_table(titles: list[str], rows: list[list[str]], left: int = 1) -> str:
    """Lay out a Markdown table, `left` columns aligned to the left and the others to the right."""
    lines = [titles, *rows]
    head, *body = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join([head, "|" + "---|" * left + "---:|" * (len(titles) - left), *body])


def with_interval(values: list[float], digits: int = 2, unit: str = "") -> str:
    """Write a mean with half of its 95 % interval, which a single value does not have."""
    mean, _, half = interval(values)
    return f"{mean:.{digits}f}" + (f" \u00b1 {half:.{digits}f}" if len(values) > 1 else "") + unit


# ---- Classification ----


def comparison(name: str, networks: str) -> str:
    """Return the report's table of one pair of networks."""
    return comparison_table([cell for cell in results(name) if cell["settings"]["networks"] == networks])


def comparison_table(cells: list[dict]) -> str:
    """Return the report's table of the cells that read the test split."""
    cells = [cell for cell in cells if "test_accuracy" in cell["models"]["student"]["metrics"]]
    report = comparison_report.markdown(cells).split("\n### ")[0]
    return "\n".join(line for line in report.splitlines() if line.startswith("|"))


def six_methods() -> str:
    """Return the README's table: six methods, and how far each is above plain training and FT."""
    values = accuracies(results("cifar10"), "test")[PAIR]
    named = {"plain": "plain", "kd": "kd,lambda_kd=1", "ft": FT}
    named |= {"ie-ft": IE_FT, "ie-ft+kd": IE_FT_KD, "od": "od,lambda_inh=20"}
    rows = []
    for name, method in named.items():
        minus_plain = "" if name == "plain" else paired(values[method], values["plain"])
        minus_ft = "" if name == "ft" else paired(values[method], values[FT])
        rows.append([f"`{name}`", with_interval(list(values[method].values())), minus_plain, minus_ft])
    return rows_to_table(["method", "accuracy, %", "- plain", "- ft"], rows)


def larger_student() -> str:
    """Return the accuracies of a student larger than its teacher, seed by seed."""
    values = accuracies(results("cifar10"), "test")[LARGER]
    columns = [values[method] for method in ("plain", FT, IE_FT)]
    rows = [[str(seed), *(f"{column[seed]:.2f}" for column in columns)] for seed in sorted(columns[0])]
    rows.append(["mean", *(with_interval(list(column.values())) for column in columns)])
    return rows_to_table(["seed", "plain", "FT", "IE-FT"], rows, left=0)


def peers() -> str:
    """Return the accuracies of two networks that teach each other."""
    both = accuracies(results("cifar10"), "test")
    rows = []
    for method in ("alone", DML, DML_03, IE_DML_100, IE_DML):
        name, *weights = method.split(",")
        row = [name, ", ".join(weight.split("=")[1] for weight in weights) or "-"]
        for peer in (1, 2):
            values = both[f"{PEERS}, peer {peer}"]
            row.append(with_interval(list(values[method].values())))
            row += ["" if method == other else paired(values[method], values[other]) for other in ("alone", DML)]
        rows.append(row)
    titles = ["method", "weights", "peer 1", "- alone", "- dml", "peer 2", "- alone", "- dml"]
    return rows_to_table(titles, rows, left=2)


def variants() -> str:
    """Return what was tried to make exploration gain accuracy, in the order of accuracy."""
    cells = [cell for cell in results("cifar10_small") if cell["settings"]["seed"] >= 10]
    values = accuracies(cells, "validation")[SMALL]

    def as_typed(method: str) -> str:
        name, *changes = method.split(",")
        preset = {f"{key}={value:g}" for key, value in METHODS[name].items() if key.startswith("lambda_")}
        return f"`{','.join([name, *(change for change in changes if change not in preset)])}`"

    means = {method: interval(list(of_seeds.values()))[0] for method, of_seeds in values.items()}
    rows = []
    for method in sorted(means, key=lambda method: (method != "plain", means[method])):
        differences = ["" if method == other else paired(values[method], values[other]) for other in (FT, "plain")]
        rows.append([as_typed(method), with_interval(list(values[method].values())), *differences])
    return rows_to_table(["`--methods`", "accuracy", "- ft", "- plain"], rows)


def explorations() -> str:
    """Return ways to explore beside inheritance alone, with a teacher of right labels and one of partly wrong ones."""
    runs = results("explorations")
    columns = [
        accuracies([run for run in runs if run["settings"]["flipped_labels"] == flipped], "validation")[SMALL]
        for flipped in (0.0, 0.2)
    ]
    rows = []
    for method, title in EXPLORATIONS.items():
        row = [title]
        for values in columns:
            found = values.get(method, {})
            row.append(with_interval(list(found.values())) if found else "-")
            row.append("" if method == INHERITANCE or not found else paired(found, values[INHERITANCE]))
        rows.append(row)
    titles = ["what a ResNet-8 does", "teacher told right", "- inheritance", "a fifth told wrong", "- inheritance"]
    return rows_to_table(titles, rows)


def automatic_weights() -> str:
    """Return what automatic weights come to, beside weights that were chosen by hand."""
    early = accuracies(results("automatic"), "validation")[SMALL]
    late = accuracies(near_convergence(), "test")[CONVERGENCE]
    shown, cells = flowers.accuracies(results("flowers_automatic"), "test"), mean_precisions("bccd_small")
    places = [
        ("early learning, 2,000 images of CIFAR-10, held-out", early, IE_FT, "3000, 300"),
        ("near convergence, CIFAR-10", late, IE_FT_500, "500, 50"),
        ("photographs, 150 labels", shown[150], "ie-ft", "3000, 300"),
        ("photographs, 1,500 labels", shown[1500], "ie-ft", "3000, 300"),
        ("blood cells of 96x128, 12 epochs, mAP", cells, "ie-ft, 3000, 300", "3000, 300"),
    ]
    rows = []
    for place, values, chosen, weights in places:
        automatic = [next((values[name] for name in names if name in values), {}) for names in (AUTO_10, AUTO_1)]
        by_hand = {seed: value for seed, value in values[chosen].items() if any(seed in found for found in automatic)}
        differences = [paired(found, by_hand) for found in automatic]
        rows.append([place, weights, with_interval(list(by_hand.values())), *differences])
    titles = ["IE-FT", "weights by hand", "with these", "auto, shares 10 and 1: difference", "shares 1 and 0.1"]
    return rows_to_table(titles, rows, left=2)


def near_convergence(networks: str = CONVERGENCE, mixed_precision: str = "bf16") -> list[dict]:
    """Return the runs near convergence; those in float32 were added later, with seeds of their own."""
    wanted = {"networks": networks, "mixed_precision": mixed_precision}
    return [run for run in results("convergence") if wanted.items() <= run["settings"].items()]


def convergence_again() -> str:
    """Return what was added on another machine, beside IE-FT with the weights chosen before."""
    values = accuracies(near_convergence(mixed_precision="no"), "test")[CONVERGENCE]
    rows = []
    for method, found in sorted(values.items(), key=lambda item: interval(list(item[1].values()))[0]):
        difference = "" if method == IE_FT_500 else paired(found, values[IE_FT_500])
        rows.append([f"`{method}`", str(len(found)), with_interval(list(found.values())), difference])
    return rows_to_table(["method", "seeds", "accuracy", "- IE-FT, 500 and 50"], rows)


def preset_rows() -> str:
    """Return for each method what was tried, what its preset came to in two places, and what others did later."""
    values = {part: accuracies(results("cifar10"), part)[PAIR] for part in ("validation", "test")}
    late = accuracies(near_convergence(), "test")[CONVERGENCE]
    few = average_accuracy.accuracies(results("few_labels_all"))

    def gains_later(kept: re.Pattern) -> str:
        methods = [method for method in sorted(late, key=weight_numbers) if kept.fullmatch(method)]
        return "; ".join(f"{paired(late[method], late['plain'])} at {weights_of(method)}" for method in methods) or "-"

    rows = []
    for name in METHODS:
        preset = label(name)
        # Choices were made on held-out images with seed 0, by the method's own weights alone.
        kept = re.compile(rf"{re.escape(name)}(,lambda_\w+=[\d.]+)*")
        tried = {m: of[0] for m, of in values["validation"].items() if kept.fullmatch(m) and 0 in of}
        chosen = "; ".join(f"{weights_of(m)}: {tried[m]:.1f}" for m in sorted(tried, key=weight_numbers))
        if name != "plain":
            early = paired(values["test"].get(preset, {}), values["test"]["plain"])
            labelled = paired(few.get(name, {}), few["plain student"])
            rows.append([f"`{name}`", weights_of(preset), chosen or "-", early, labelled, gains_later(kept)])
    titles = ["`method`", "preset", "tried", "early, - plain", "few labels, - plain", "near convergence, - plain"]
    return rows_to_table(titles, rows, left=3)


def weights_of(method: str) -> str:
    """Write the weights of a method that the results name."""
    return ", ".join(change.split("=")[1] for change in method.split(",")[1:] if change.startswith("lambda_")) or "-"


def weight_numbers(method: str) -> list[float]:
    """Return the weights of a method, to sort by."""
    return [float(value) for value in re.findall(r"lambda_\w+=([\d.]+)", method)]


def claims() -> str:
    """Return the paper's claims, with what was measured here and what it answers."""
    cifar, small = accuracies(results("cifar10"), "test"), accuracies(results("cifar10_small"), "test")[SMALL]
    pair, larger = cifar[PAIR], cifar[LARGER]
    late, larger_late = (accuracies(near_convergence(of), "test")[of] for of in (CONVERGENCE, CONVERGENCE_20))
    longer = accuracies(results("longer"), "test")[CONVERGENCE]
    peer_1, peer_2 = (cifar[f"{PEERS}, peer {i}"] for i in (1, 2))
    cells, drawn = mean_precisions("bccd"), mean_precisions("shapes")
    at, ie_at = "at,lambda_inh=30", "ie-at,lambda_inh=30,lambda_exp=3"
    od, ie_od = "od,lambda_inh=20", "ie-od,lambda_inh=20,lambda_exp=10000"
    half, exploring = INHERITANCE, "exploration,lambda_exp=300"

    def cka(method: str) -> dict[int, float]:
        return of_analysis(method, lambda run: run["cka"]["teacher"]["exploration half"])

    def active(method: str) -> dict[int, float]:
        return of_analysis(method, lambda run: 100 * run["active_neurons"]["student"]["active_share"])

    def mean(values: dict[int, float]) -> float:
        return interval(list(values.values()))[0]

    difference, _, half_of_it = interval([cka("ie-ft")[seed] - cka("inheritance")[seed] for seed in cka("ie-ft")])

    def one_digit(first: dict, second: dict) -> str:
        value, _, width = interval([first[seed] - second[seed] for seed in sorted(first)])
        return f"{value:+.1f} \u00b1 {width:.1f}"

    rows = [
        [
            "IE improves factor transfer (FT)",
            f"IE-FT - FT: {paired(pair[IE_FT], pair[FT])}; on 2,000 images {paired(small[IE_FT], small[FT])}; "
            f"[near convergence](convergence.md) {paired(late[IE_FT_500], late[FT_300])}, over "
            f"[40 epochs](convergence.md#the-longer-comparison) {paired(longer[IE_FT_500], longer[FT_300])}; for a "
            f"[larger student](convergence.md#a-larger-student) {paired(larger_late[IE_FT_500], larger_late[FT_300])}",
            "for the larger student, where inheritance alone does as well; over 40 epochs the opposite",
        ],
        ["IE improves attention transfer (AT)", f"IE-AT - AT: {paired(pair[ie_at], pair[at])}", "no, the opposite"],
        ["IE improves OD", f"IE-OD - OD: {paired(pair[ie_od], pair[od])}", "not seen"],
        [
            "both halves are better than inheritance alone",
            f"IE-FT - inheritance: {paired(pair[IE_FT], pair[half])}; near convergence "
            f"{paired(late[IE_FT_500], late[INHERITANCE_500])}, over 40 epochs "
            f"{paired(longer[IE_FT_500], longer[INHERITANCE_500])}, for the larger student "
            f"{paired(larger_late[IE_FT_500], larger_late[INHERITANCE_500])}",
            "not seen",
        ],
        [
            "exploration alone",
            f"exploration - plain: {paired(pair[exploring], pair['plain'])}",
            "no harm, no proven gain",
        ],
        [
            "student larger than the teacher: IE-KD > plain",
            f"IE-FT - plain: {paired(larger[IE_FT], larger['plain'])}",
            "on average, not proven",
        ],
        ["the same: IE-KD > imitation alone", f"IE-FT - FT: {paired(larger[IE_FT], larger[FT])}", "not seen"],
        [
            "the same: plain > imitation alone",
            f"FT - plain: {paired(larger[FT], larger['plain'])}",
            "no, the opposite",
        ],
        [
            "IE-DML > DML, for both peers",
            f"{paired(peer_1[IE_DML], peer_1[DML])} and {paired(peer_2[IE_DML], peer_2[DML])}; with weights "
            f"100 and 10 {paired(peer_1[IE_DML_100], peer_1[DML])} and {paired(peer_2[IE_DML_100], peer_2[DML])}",
            "against DML as published: for peer 2, for both with 100 and 10; not against DML with a chosen weight",
        ],
        [
            "IE-KD improves [detection](detection.md#blood-cells)",
            f"mAP, five seeds: IE-FT - plain {paired(cells['ie-ft, 3000, 300'], cells['plain student'])}, "
            f"IE-FT - FT {paired(cells['ie-ft, 3000, 300'], cells['ft, 15000'])}",
            "not seen",
        ],
        [
            "the same on [drawn shapes](detection.md#shapes)",
            f"IE-FT - plain {paired(drawn['ie-ft, 3000, 300'], drawn['plain student'])}; where both begin with the "
            f"teacher's head {paired(drawn[f'ie-ft, 3000, 300, {HEAD}'], drawn[f'plain, {HEAD}'])}, OD - plain "
            f"{paired(drawn[f'od, 20, {HEAD}'], drawn[f'plain, {HEAD}'])}",
            "holds on so short a schedule, as does OD",
        ],
        [
            "the exploring half is less like the teacher (CKA)",
            f"{mean(cka('ie-ft')):.2f}, against {mean(cka('inheritance')):.2f} for a half that is left alone: "
            f"{difference:+.3f} \u00b1 {half_of_it:.3f}",
            "holds",
        ],
        [
            "more neurons are active",
            f"{mean(active('ie-ft')):.1f} % with IE-FT, {mean(active('ft')):.1f} with FT: "
            f"{one_digit(active('ie-ft'), active('ft'))}; {mean(active('inheritance')):.1f} with inheritance alone: "
            f"{one_digit(active('ie-ft'), active('inheritance'))}",
            "holds against FT",
        ],
        ["the halves look at different parts", "Grad-CAM on six images, by eye", "not seen"],
    ]
    return rows_to_table(["claim", "measured here", "answer"], rows, left=3)


# ---- Analysis of the halves ----


def of_analysis(method: str, take: Callable[[dict], float]) -> dict[int, float]:
    """Return one number of each seed's analysis; no seeds where the method does not have it."""
    found = {}
    for name, run in results("analysis").items():
        of_method, seed = name.split(", seed ")
        if of_method == method:
            try:
                found[int(seed)] = take(run)
            except KeyError:
                return {}
    return found


def halves() -> str:
    """Return CKA, active neurons and varying factors by method."""

    def cell(method: str, take: Callable[[dict], float], digits: int, unit: str = "") -> str:
        values = list(of_analysis(method, take).values())
        return with_interval(values, digits, unit) if values else "-"

    def half(run: dict, name: str) -> str:
        # FT has no second half: its "inheritance half" is the whole student.
        if "exploration half" not in run["cka"]:
            raise KeyError(name)
        return name

    columns = {
        "CKA, teacher and student": lambda m: cell(m, lambda r: r["cka"]["teacher"]["student"], 2),
        "and inheriting half": lambda m: cell(m, lambda r: r["cka"]["teacher"][half(r, "inheritance half")], 2),
        "and other half": lambda m: cell(m, lambda r: r["cka"]["teacher"]["exploration half"], 2),
        "CKA of the halves": lambda m: cell(m, lambda r: r["cka"]["inheritance half"]["exploration half"], 2),
        "active neurons": lambda m: cell(m, lambda r: 100 * r["active_neurons"]["student"]["active_share"], 1, " %"),
        "of the other half": lambda m: cell(
            m, lambda r: 100 * r["active_neurons"]["exploration half"]["active_share"], 1, " %"
        ),
        "varying factors, inheriting": lambda m: cell(
            m, lambda r: 100 * r["varying_factors"]["inheritance half"], 1, " %"
        ),
        "exploring": lambda m: cell(m, lambda r: 100 * r["varying_factors"]["exploration half"], 1, " %"),
    }
    plain = ["plain"]
    for title in columns:
        # Each run was compared with the plain student of its seed; those of IE-FT stand for all.
        take = {
            "CKA, teacher and student": (lambda r: r["cka"]["teacher"]["plain student"], 2, ""),
            "active neurons": (lambda r: 100 * r["active_neurons"]["plain student"]["active_share"], 1, " %"),
        }.get(title)
        plain.append("-" if take is None else cell("ie-ft", *take))
    methods = ("ft", "inheritance", "ie-ft", "exploration")
    rows = [plain, *([method, *(column(method) for column in columns.values())] for method in methods)]
    return rows_to_table(["method", *columns], rows)


# ---- Detection ----


def detection(name: str) -> str:
    """Return the averages over the seeds of one data set."""
    return average_detection.markdown(results(name))


def mean_precisions(name: str) -> dict[str, dict[int, float]]:
    """Return mAP by model and seed, in percent."""
    models = average_detection.by_model(results(name))
    return {name: {seed: 100 * m["metrics"]["map"] for seed, m in seeds.items()} for name, seeds in models.items()}


# ---- Speed ----


def speed_case(section: str, name: str) -> dict:
    """Return one case of the speed benchmark."""
    cases = {case["name"]: case for case in results("speed")["sections"][section]["cases"]}
    return cases[name]


def speed_steps() -> str:
    """Return what a step costs, with each option."""
    fast, cached = "IEKDTrainer, bf16, channels_last", "IEKDTrainer, bf16, channels_last, cached teacher"
    compiled = "IEKDTrainer, bf16, channels_last, torch_compile, compile_teacher"
    listed = [
        ("bare IE-KD loop, fp32", "steps", "bare IE-KD loop, fp32"),
        ("`IEKDTrainer`, `fast_teacher=False` (the same settings)", "steps", "IEKDTrainer, fast_teacher=False"),
        ("`IEKDTrainer`", "steps", "IEKDTrainer"),
        ("+ `channels_last`", "steps", "IEKDTrainer, channels_last"),
        ("+ `bf16`, `channels_last`", "bf16", fast),
        ('+ these, `torch_compile`, `compile_teacher`, `teacher_dtype="bfloat16"`', "compile", compiled),
        ("`IEKDTrainer`, `cache_teacher`", "steps", "IEKDTrainer, cached teacher"),
        ("student alone in `Trainer`", "steps", "student alone, Trainer"),
        ("`IEKDTrainer`, `bf16`, `channels_last`, `cache_teacher`", "bf16", cached),
        ("student alone in `Trainer`, `bf16`, `channels_last`", "bf16", "student alone, Trainer, bf16, channels_last"),
        ("teacher and its encoder, forward", "steps", "teacher and its encoder, forward"),
        ("the same, fast copy", "steps", "the same, fast copy"),
        ("the same, fast copy in bf16", "bf16", "teacher and its encoder, forward, bf16 fast copy"),
    ]
    rows = []
    for title, section, name in listed:
        case = speed_case(section, name)
        rows.append([title, f"{case['milliseconds']:.0f}", f"{case['ratio']:.3f}"])
    title = results("speed")["sections"]["steps"]["title"]
    return rows_to_table([title, "ms", "bare fp32 loop = 1"], rows)


def speed_peers() -> str:
    """Return what a step costs beside others' libraries, at both sizes."""
    rows = []
    for section in results("speed_peers")["sections"].values():
        for case in section["cases"]:
            at = section["title"].split(",")[1].strip()
            rows.append([case["name"], at, f"{case['milliseconds']:,.0f}", f"{case['ratio']:.2f}"])
    return rows_to_table(["one step", "images", "ms", "bare IE-KD loop = 1"], rows)


def speed_ratios() -> str:
    """Return the ratios, with what bounds each of them."""

    def ratio(section: str, name: str, to: str | None = None, digits: int = 3) -> str:
        case = speed_case(section, name)
        value = case["ratio"] if to is None else case["milliseconds"] / speed_case(section, to)["milliseconds"]
        return f"{value:.{digits}f}"

    def held(place: str, name: str, key: str = "in_a_step") -> str:
        section = f"memory {place}"
        return f"{speed_case(section, name)[key] / speed_case(section, alone)[key]:.1f}"

    def at_most(place: str, name: str) -> str:
        return held(place, name, "mebibytes")

    alone, cached, live = "student alone, Trainer", "IEKDTrainer, cached teacher", "IEKDTrainer"
    bf16 = ", bf16, channels_last"
    small_live, small_cached = (f"{name}, encoder_kernel_size=1" for name in (live, cached))
    small = "teacher and its encoder, forward, bf16 fast copy"
    tiny_alone = ratio("tiny", alone, "student alone, bare loop", digits=2)
    encoders = speed_case("imagenet", cached)["ratio"] - speed_case("imagenet", alone)["ratio"]
    rows = [
        ["the trainer's step / bare loop, same settings", ratio("steps", f"{live}, fast_teacher=False"), "arithmetic"],
        [
            "the same on a step of 22 ms (28x28, batch 16)",
            ratio("tiny", f"{live}, fast_teacher=False"),
            f"Trainer's own Python: the student alone takes {tiny_alone} of its bare loop there, too; "
            f"{ratio('tiny', live)} with the fast teacher",
        ],
        [
            "`bf16` + `channels_last` + fast teacher / bare fp32 loop",
            ratio("bf16", live + bf16),
            f"student {ratio('bf16', alone + bf16)} + teacher {ratio('bf16', small)}: nothing else is left",
        ],
        [
            "epoch with a cached teacher / student alone, 32x32",
            f"{ratio('steps', cached, alone, digits=2)}; "
            f"{ratio('bf16', f'{live}{bf16}, cached teacher', alone + bf16, digits=2)} in bf16",
            "the student's two encoders",
        ],
        [
            "cached / live, 224x224, ResNet-50 -> ResNet-18, batch 8",
            ratio("imagenet", cached, live, digits=2),
            f"student alone {ratio('imagenet', alone, digits=2)} + its encoders {encoders:.2f}, which have 25 million "
            "weights at the default `factor_channels` (1024), the student 11; with 256 "
            f"{ratio('imagenet k=256', cached, live, digits=2)}, where the student alone is "
            f"{ratio('imagenet k=256', alone, live, digits=2)}",
        ],
        [
            "`evaluate()` / that of the student alone, 32x32 and 224x224",
            f"{ratio('evaluation', 'evaluate() of IEKDTrainer')}, "
            f"{ratio('imagenet evaluation', 'evaluate() of IEKDTrainer')}",
            "the same code",
        ],
        ["memory in a step / student alone, 32x32", held("cifar", live), f"at most {at_most('cifar', live)}"],
        [
            "the same at 224x224",
            held("imagenet", live),
            "weights: 90 MiB teacher, 264 MiB what encodes of its paraphraser, 284 MiB student's encoders with "
            f"gradients and momentum; the bare loop takes {held('imagenet', 'bare IE-KD loop')}. At most "
            f"{at_most('imagenet', live)}, while the paraphraser is read",
        ],
        [
            "the same with `encoder_kernel_size=1`; cached",
            f"{held('imagenet', small_live)}; {held('imagenet', small_cached)}",
            "a ninth of the paraphraser's and the encoders' weights; on a CPU a cached teacher stays where it is. At "
            f"most {at_most('imagenet', small_live)}",
        ],
    ]
    lines = rows_to_table(["ratio", "measured", "bound by"], rows).splitlines()
    return "\n".join([lines[0], "|---|---:|---|", *lines[2:]])


def speed_data() -> str:
    """Return how many images a second each data path makes."""

    def images(section: str, name: str) -> str:
        names = [name, "the same once more (control)"] if name == "whole batches, crop and flip" else [name]
        found = []
        for value in (speed_case(section, each)["images_per_second"] for each in names):
            factor = 10 ** (len(f"{value:.0f}") - (3 if value >= 100_000 else 2))
            found.append(f"{round(value / factor) * factor:,}")
        return " to ".join(found)

    listed = {
        "whole batches (`DecodedImages`, `BatchAugmentation`), crop and flip": "whole batches, crop and flip",
        "the same, normalised only": "whole batches, normalised only",
        "image by image (`datasets`, image processor, kornia), crop and flip": (
            "image by image (datasets, processor, kornia), crop and flip"
        ),
        "the same, normalised only ": "image by image, normalised only",
    }
    rows = [
        # Large images are read from their files, of which there is a table of its own.
        [title.strip(), images("data", name), images("imagenet data", name) if name.startswith("whole") else "below"]
        for title, name in listed.items()
    ]
    return rows_to_table(["images a second on one core", "32x32", "256x256 to 224x224"], rows)


def speed_files() -> str:
    """Return how many photographs a second are read from their files, beside decoding alone."""
    rows = []
    for title, name in (
        ("decoded alone, as they are", "decoding alone"),
        ("cropped, resized and flipped to 224x224, as in training", "image by image, crop and flip"),
        ("processed to 224x224, as in evaluation", "image by image, as in evaluation"),
    ):
        row = [title]
        for section in ("files", "large files"):
            case = speed_case(section, name)
            row += [f"{case['images_per_second']:.0f}", f"{case['ratio']:.2f}"]
        rows.append(row)
    titles = ["JPEG files, images a second on one core", "about 500x375", "time / decoding", "about 1500x1125"]
    return rows_to_table([*titles, "time / decoding"], rows)


# ---- Arguments ----


def arguments_of(arguments: type, rare: bool) -> str:
    """Return the arguments that a class adds to `TrainingArguments`, its own before those that it shares."""
    inherited = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    fields = {field.name: field for field in dataclasses.fields(arguments)}
    own = [name for name in vars(arguments)["__annotations__"] if name in fields]
    added = [name for name, f in fields.items() if name not in inherited or f.default != inherited[name].default]
    order = [*(name for name in own if name in added), *(name for name in added if name not in own)]
    rows = []
    for name in order:
        if (name in RARE) != rare:
            continue
        field = fields[name]
        # Names with underscores are code, and would be set in italics otherwise.
        text, _, said = re.sub(r"\b\w*_\w+", r"`\g<0>`", field.metadata["help"]).partition(" Default: ")
        default = said.rstrip(".") if said else f"`{field.default}`"
        choices = field.metadata.get("choices", [])
        if choices and name != "method":
            text += " One of " + ", ".join(f"`{choice}`" for choice in choices) + "."
        rows.append([f"`{name}`", default, text])
    return rows_to_table(["argument", "default", "meaning"], rows, left=3)


def presets() -> str:
    """Return the defaults that each method sets."""
    titles = ["knowledge", "lambda_inh", "lambda_exp", "lambda_kd", "inheritance_ratio"]
    titles += ["inheritance_distance", "exploration_distance"]
    rows = []
    for method, values in METHODS.items():
        if method.endswith("+kd"):
            continue
        shown = [f"{values[t]:g}" if isinstance(values[t], float) else values[t] for t in titles]
        rows.append([f"`{method}`", *shown])
    return rows_to_table(["`method`", *(f"`{title}`" for title in titles)], rows, left=2)


def photographs(kind: str | None, baseline: str, *beside: str) -> str:
    """Return a table of flowers.py: recipes of one kind, or those of none, and a few beside them."""
    kinds = ("optim=adamw_torch", "encoder_kernel_size", "paraphraser_decoder", "=auto")

    def is_shown(recipe: str) -> bool:
        return recipe in beside or (kind in recipe if kind else not any(other in recipe for other in kinds))

    return flowers.markdown(
        [c for c in results("flowers") if is_shown(c["settings"]["method"])], baselines=(baseline,)
    )


TABLES: dict[str, Callable[[], str]] = {
    "six-methods": six_methods,
    "cifar10": lambda: comparison("cifar10", PAIR),
    "cifar10-small": lambda: comparison("cifar10_small", SMALL),
    "digits": lambda: comparison("digits", SMALL),
    "few-labels": lambda: average_accuracy.markdown(results("few_labels")),
    "peers-few-labels": lambda: average_accuracy.markdown(results("peers_few_labels")),
    "claims": claims,
    "larger-student": larger_student,
    "peers": peers,
    "variants": variants,
    "explorations": explorations,
    "automatic-weights": automatic_weights,
    "preset-rows": preset_rows,
    "convergence": lambda: comparison_table(near_convergence()),
    "convergence-20": lambda: comparison_table(near_convergence(CONVERGENCE_20)),
    "longer": lambda: comparison_table(results("longer")),
    "longer-20": lambda: comparison_table(results("longer_20")),
    "convergence-again": convergence_again,
    "halves": halves,
    "blood-cells": lambda: detection("bccd"),
    "shapes": lambda: detection("shapes"),
    "flowers": lambda: photographs(None, "plain"),
    "flowers-adamw": lambda: photographs("optim=adamw_torch", f"{FEATURES_FIRST} > plain,{ADAMW}"),
    "flowers-coders": lambda: photographs("encoder_kernel_size", "ie-ft", "ie-ft", LINEAR),
    "masked-shapes": lambda: average_accuracy.markdown(results("masked_shapes")),
    "speed-steps": speed_steps,
    "speed-ratios": speed_ratios,
    "speed-data": speed_data,
    "speed-files": speed_files,
    "speed-peers": speed_peers,
    "streams": lambda: streams.table(results("streams")),
    "presets": presets,
    "iekd-arguments": lambda: arguments_of(IEKDTrainingArguments, rare=False),
    "iekd-arguments-rare": lambda: arguments_of(IEKDTrainingArguments, rare=True),
    "mutual-arguments": lambda: arguments_of(MutualTrainingArguments, rare=False),
    "mutual-arguments-rare": lambda: arguments_of(MutualTrainingArguments, rare=True),
}


def fill(text: str) -> str:
    """Return a document with its tables written again."""

    def replace(match: re.Match) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"Expected a table among {', '.join(TABLES)}; got {match[2]!r}.")
        return f"{match[1]}\n{TABLES[match[2]]()}\n\n{match[3]}"

    return TABLE.sub(replace, text)


def help_of(command: str) -> str:
    """Return what `--help` of a command shows."""
    module = importlib.import_module(f"iekd_hf.commands.{command}")
    return CommandParser(module.KINDS, module.__doc__, f"iekd-hf {command}").format_help()


def documents() -> list[Path]:
    """Return the files that people read."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Write nothing; fail where a table differs.")
    check = parser.parse_args().check
    differing, texts = [], {path: path.read_text() for path in documents()}
    used = {name for text in texts.values() for _, name, _ in TABLE.findall(text)}
    written = {path: fill(text) for path, text in texts.items()}
    written |= {ROOT / "iekd_hf" / "commands" / "help" / f"{command}.txt": help_of(command) for command in COMMANDS}
    for path, text in written.items():
        if not path.is_file() or path.read_text() != text:
            differing.append(str(path.relative_to(ROOT)))
            if not check:
                path.write_text(text)
    if unused := TABLES.keys() - used:
        sys.exit(f"Expected each table in a document, got none with {', '.join(sorted(unused))}.")
    if check and differing:
        sys.exit(f"Expected generated texts, got others in {', '.join(differing)}: run python docs/generate.py.")


if __name__ == "__main__":
    main()
