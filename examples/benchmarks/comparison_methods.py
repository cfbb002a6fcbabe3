"""How a comparison names its methods: by what they are, so that a preset that changes makes another cell."""

import json
import re
from dataclasses import fields
from typing import Any

from iekd_hf import METHODS, IEKDTrainingArguments, MutualTrainingArguments


MUTUAL = {"alone": None, "dml": "kl", "ie-dml": "ie", "ie-dml+kl": "ie+kl"}
WEIGHTS_OF = {"ie": ("lambda_inh", "lambda_exp"), "kl": ("lambda_kl",)}
LAMBDAS = ("lambda_inh", "lambda_exp", "lambda_kd", "lambda_kl")


def parse_method(method: str) -> tuple[str, dict]:
    """
    Split a method into its name and its arguments.

    Args:
        method (`str`):
            A name of `IEKDTrainingArguments.method` or of mutual learning, and after commas what differs from it.

    Returns:
        `tuple[str, dict]`: the name, and values by argument.

    Raises:
        `ValueError`: an unknown name, or a value that cannot be read.

    Example:

    ```python
    >>> parse_method("ie-ft,lambda_inh=300,lambda_schedule=cosine")
    ('ie-ft', {'lambda_inh': 300, 'lambda_schedule': 'cosine'})

    ```
    """
    name, *changes = method.split(",")
    if name not in METHODS and name not in MUTUAL:
        raise ValueError(f"Expected a method among {', '.join([*METHODS, *MUTUAL])}; got {name!r}.")
    return name, dict(_read(change) for change in changes)


def _read(change: str) -> tuple[str, Any]:
    key, _, value = change.partition("=")
    if value not in ("true", "false") and not re.match(r"[-\d.\[]", value):
        return key, value
    try:
        return key, json.loads(value)
    except ValueError as error:
        raise ValueError(f"Expected numbers as JSON has them (0.5, 1e-3, [1, 2]), got {change!r}.") from error


def check_method(method: str, networks: str) -> None:
    """
    Refuse a method that networks cannot be trained with.

    Args:
        method (`str`):
            As above.
        networks (`str`):
            `teacher:student`, or peers `first+second`.

    Raises:
        `ValueError`: a method of the other kind, or an argument that there is not.

    Example:

    ```python
    >>> check_method("ie-dml", "cifar-resnet-20+cifar-resnet-20")

    ```
    """
    name, changes = parse_method(method)
    is_pair = ":" in networks
    methods, arguments = (METHODS, IEKDTrainingArguments) if is_pair else (MUTUAL, MutualTrainingArguments)
    if name not in methods:
        raise ValueError(f"Expected a method for {networks} among {', '.join(methods)}; got {name!r}.")
    known = {field.name for field in fields(arguments)} | ({"exploration"} if is_pair else set())
    if unknown := sorted(changes.keys() - known):
        raise ValueError(f"Expected fields of {arguments.__name__} in {method!r}, got {', '.join(unknown)}.")


def label(method: str) -> str:
    """
    Write a method with all its weights.

    Args:
        method (`str`):
            As above.

    Returns:
        `str`: a method that means the same whatever the presets are.

    Example:

    ```python
    >>> label("ft,lambda_inh=300"), label("ft,inheritance_ratio=0.5,lambda_inh=300.0"), label("dml")
    ('ft,lambda_inh=300', 'ft,lambda_inh=300,inheritance_ratio=0.5', 'dml,lambda_kl=1')

    ```
    """
    name, changes = parse_method(method)
    preset = METHODS[name] if name in METHODS else _preset_of_peers(name)
    weights = {key: value for key, value in {**preset, **changes}.items() if key in LAMBDAS}
    parts = [f"{key}={written(weights[key])}" for key in LAMBDAS if weights.get(key) or key in changes]
    parts += [f"{key}={value}" for key, value in sorted(changes.items()) if key not in LAMBDAS]
    return ",".join([name, *parts])


def written(value: float | str) -> str:
    """
    Write a weight, a number or "auto".

    Args:
        value (`float` or `str`):
            The weight.

    Returns:
        `str`: as short as it can be.

    Example:

    ```python
    >>> written(300.0), written("auto")
    ('300', 'auto')

    ```
    """
    return value if isinstance(value, str) else f"{value:g}"


def _preset_of_peers(name: str) -> dict[str, float]:
    losses = (MUTUAL[name] or "").split("+")
    return {key: getattr(MutualTrainingArguments, key) for loss in losses for key in WEIGHTS_OF.get(loss, ())}
