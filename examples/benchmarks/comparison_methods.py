"""How a comparison names its methods: by what they are, so that a preset that changes makes another cell."""

import json
import re

from iekd_hf import METHODS, MutualTrainingArguments


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
        `ValueError`: an unknown name.

    Example:

    ```python
    >>> parse_method("ie-ft,lambda_inh=300,lambda_schedule=cosine")
    ('ie-ft', {'lambda_inh': 300, 'lambda_schedule': 'cosine'})

    ```
    """
    name, *changes = method.split(",")
    if name not in METHODS and name not in MUTUAL:
        raise ValueError(f"Expected a method among {', '.join([*METHODS, *MUTUAL])}; got {name!r}.")
    pairs = (change.split("=", 1) for change in changes)
    return name, {key: json.loads(value) if re.match(r"[-\d.\[]", value) else value for key, value in pairs}


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
