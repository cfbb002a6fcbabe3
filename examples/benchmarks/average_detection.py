"""
Average detection runs over their seeds: a table in Markdown, with differences from the plain student of the same seed.

    python examples/benchmarks/average_detection.py --runs cells-* --output_file cells.json

Each folder is an --output_dir of run_iekd_detection.py. The plain student of a seed counts once, and so does a teacher
that several runs share.
"""

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from comparison_methods import written
from comparison_report import interval, paired

from iekd_hf.commands.boxes.metrics import SUMMARY
from iekd_hf.commands.parser import parse_arguments
from iekd_hf.commands.report.results import RESULTS
from iekd_hf.method.objective import AUTO


# Titles by the metrics' names; after them come the classes.
COLUMNS = {"map": "mAP", "map_50": "mAP50", "map_75": "mAP75"}
PLAIN, DISTILLED, HEAD = "plain student", "distilled student", "teacher's head"


@dataclass
class AverageArguments:
    """Say which runs."""

    runs: list[str] = field(default_factory=list, metadata={"help": "Output folders of finished runs."})
    output_file: str | None = field(default=None, metadata={"help": "JSON file for what all runs have measured."})


def read_runs(folders: list[str]) -> list[dict]:
    """
    Read what runs have measured, with what their losses amounted to.

    Args:
        folders (`list[str]`):
            Output folders.

    Returns:
        `list[dict]`: `settings`, `models` and `gradient_shares` of each.

    Raises:
        `ValueError`: a folder without results, or runs with the same settings.
    """
    runs, seen = [], {}
    for folder in folders:
        file, trained = Path(folder, RESULTS), Path(folder, "train_results.json")
        if not file.is_file():
            raise ValueError(f"Expected the output folder of a finished run, got {folder!r} without {RESULTS}.")
        run = json.loads(file.read_text())
        settings = json.dumps(run["settings"], sort_keys=True)
        if settings in seen:
            raise ValueError(
                f"Expected runs that differ in seed or method, got {seen[settings]!r} and {folder!r}: keep one."
            )
        seen[settings] = folder
        metrics = json.loads(trained.read_text()) if trained.is_file() else {}
        run["gradient_shares"] = {name: value for name, value in metrics.items() if name.endswith("gradient_share")}
        runs.append(run)
    return runs


def by_model(runs: list[dict]) -> dict[str, dict[int, dict]]:
    """
    Sort what was measured by model and seed.

    Args:
        runs (`list[dict]`):
            What [`read_runs`] gave.

    Returns:
        `dict[str, dict[int, dict]]`: by name, with method, weights and whether it began with the teacher's head where
        it is distilled, and by seed. Teachers have no seed of their own: each one is counted once.

    Example:

    ```python
    >>> settings = {"seed": 1, "method": "ft", "lambda_inh": 300.0, "lambda_exp": 0.0}
    >>> model = {"parameters": 9, "metrics": {"map": 0.5}}
    >>> by_model([{"settings": settings, "models": {"teacher": model, "distilled student": model}}]).keys()
    dict_keys(['teacher', 'ft, 300'])
    >>> settings |= {"lambda_inh": "auto", "inheritance_share": 10.0, "exploration_share": 1.0}
    >>> by_model([{"settings": settings, "models": {"distilled student": model}}]).keys()
    dict_keys(['ft, auto, shares 10 and 1'])

    ```
    """
    found = defaultdict(dict)
    for run in runs:
        settings = run["settings"]
        for name, model in run["models"].items():
            if not model["metrics"]:  # of a classifier that teaches
                continue
            if name == "teacher":
                known = [_precisions(each) for each in found[name].values()]
                if _precisions(model) not in known:
                    found[name][len(known)] = model
                continue
            weights = [written(settings[key]) for key in ("lambda_inh", "lambda_exp") if settings[key]]
            if AUTO in weights:
                weights.append(f"shares {settings['inheritance_share']:g} and {settings['exploration_share']:g}")
            head = [HEAD] if settings.get("inherit_head") else []  # which older runs do not know
            title = ", ".join([settings["method"], *weights, *head]) if name == DISTILLED else name
            known = found[title].setdefault(settings["seed"], model)
            check_same(title, settings["seed"], *(100 * each["metrics"]["map"] for each in (known, model)))
    return dict(found)


def check_same(title: str, seed: int, known: float, found: float) -> None:
    """
    Refuse runs that a table would have to put in one place.

    Args:
        title (`str`), seed (`int`):
            The row's title, and the seed.
        known (`float`), found (`float`):
            What the first of the runs has measured, and what another one has.

    Raises:
        `ValueError`: if they differ.
    """
    if known != found:
        raise ValueError(
            f"Expected one run of {title!r} with seed {seed}, got two that differ, {known:.2f} and {found:.2f}: "
            "average runs of other weights, numbers of labels or epochs by themselves."
        )


def _precisions(model: dict) -> dict[str, float]:
    return {name: value for name, value in model["metrics"].items() if name.startswith("map")}


def markdown(runs: list[dict]) -> str:
    """
    Write the table.

    Args:
        runs (`list[dict]`):
            What [`read_runs`] gave.

    Returns:
        `str`: Markdown, metrics in percent; after a plus-minus half of the mean's 95 % interval.

    Raises:
        `ValueError`: runs on other classes.
    """
    models = by_model(runs)
    measured = [model["metrics"] for seeds in models.values() for model in seeds.values()]
    classes = [name for name in measured[0] if name.startswith("map_") and name not in SUMMARY]
    for metrics in measured:
        if not {*COLUMNS, *classes} <= metrics.keys():
            raise ValueError(f"Expected runs on the same classes, got {list(metrics)} beside {list(measured[0])}.")
    columns = {**COLUMNS, **{name: name.removeprefix("map_") for name in classes}}
    plain = models.get(PLAIN, {})
    titles = ["model", "parameters", "seeds", *columns.values(), *([f"mAP - {PLAIN}"] if plain else [])]
    lines = ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]

    def percent(seeds: dict[int, dict], metric: str) -> dict[int, float]:
        return {seed: 100 * model["metrics"][metric] for seed, model in seeds.items()}

    for name in sorted(models, key=lambda name: (name != "teacher", name != PLAIN)):
        seeds = models[name]
        row = [name, f"{next(iter(seeds.values()))['parameters']:,}", str(len(seeds))]
        for metric in columns:
            mean, _, half = interval(list(percent(seeds, metric).values()))
            row.append(f"{mean:.1f}" + (f" \u00b1 {half:.1f}" if metric == "map" and len(seeds) > 1 else ""))
        if plain:
            distilled = name not in ("teacher", PLAIN)
            row.append(paired(percent(seeds, "map"), percent(plain, "map")) if distilled else "")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def average(markdown: Callable[[list[dict]], str], doc: str) -> None:
    """
    Print a table of the runs that the command line names, and write what they measured where it says.

    Args:
        markdown (`Callable`):
            Makes the table of what [`read_runs`] gave.
        doc (`str`):
            The script's own, for `--help`.
    """
    (args,) = parse_arguments((AverageArguments,), doc)
    if not args.runs:
        raise ValueError("Expected --runs with output folders of finished runs, got none.")
    runs = read_runs(args.runs)
    print(markdown(runs))
    if args.output_file:
        Path(args.output_file).write_text(json.dumps(runs, indent=1) + "\n")


def main() -> None:
    average(markdown, __doc__)


if __name__ == "__main__":
    main()
