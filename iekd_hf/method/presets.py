"""The methods that `IEKDTrainer` knows by name: what each compares, and with which weights."""

# Weights chosen on held-out images of CIFAR-10, a ResNet-56 teaching a ResNet-20 (docs/results/weights.md).
_LAMBDA_KD = 1.0

_FACTORS = {"knowledge": "factors", "inheritance_distance": "l1", "exploration_distance": "l1"}
# AT and OD minimise these; exploring turns them round, and compares directions, as OD's distance has no bound.
_ATTENTION = {"knowledge": "attention", "inheritance_distance": "cosine", "exploration_distance": "orthogonal"}
_PREACTIVATION = {
    "knowledge": "preactivation",
    "inheritance_distance": "partial_l2",
    "exploration_distance": "partial_l2",
}
_WHOLE, _HALF = {"inheritance_ratio": 1.0}, {"inheritance_ratio": 0.5}

# The methods that `IEKDTrainer` knows by name, as defaults of its other arguments.
METHODS: dict[str, dict[str, str | float]] = {
    "plain": {**_FACTORS, **_HALF, "lambda_inh": 0.0, "lambda_exp": 0.0},
    "kd": {**_FACTORS, **_HALF, "lambda_inh": 0.0, "lambda_exp": 0.0, "lambda_kd": _LAMBDA_KD},
    "ft": {**_FACTORS, **_WHOLE, "lambda_inh": 1500.0, "lambda_exp": 0.0},
    "at": {**_ATTENTION, **_WHOLE, "lambda_inh": 30.0, "lambda_exp": 0.0},
    "od": {**_PREACTIVATION, **_WHOLE, "lambda_inh": 20.0, "lambda_exp": 0.0},
    "ie-ft": {**_FACTORS, **_HALF, "lambda_inh": 3000.0, "lambda_exp": 300.0},
    "ie-at": {**_ATTENTION, **_HALF, "lambda_inh": 30.0, "lambda_exp": 3.0},
    "ie-od": {**_PREACTIVATION, **_HALF, "lambda_inh": 20.0, "lambda_exp": 10000.0},
    "inheritance": {**_FACTORS, **_HALF, "lambda_inh": 3000.0, "lambda_exp": 0.0},
    "exploration": {**_FACTORS, **_HALF, "lambda_inh": 0.0, "lambda_exp": 300.0},
}
METHODS = {name: {"lambda_kd": 0.0, **values} for name, values in METHODS.items()}
METHODS |= {
    f"{name}+kd": {**values, "lambda_kd": _LAMBDA_KD}
    for name, values in METHODS.items()
    if name not in ("plain", "kd")
}
