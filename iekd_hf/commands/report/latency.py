"""How long a model takes for one image."""

from collections.abc import Callable

from torch.utils.benchmark import Timer


def median_milliseconds(run: Callable, *inputs, threads: int = 1, seconds: float = 1.0) -> float:
    """
    Measure a call.

    Args:
        run (`Callable`):
            What to call.
        inputs:
            What with.
        threads (`int`, *optional*, defaults to 1):
            Threads of torch while it runs; other runtimes have settings of their own.
        seconds (`float`, *optional*, defaults to 1.0):
            How long to measure, after a warm-up.

    Returns:
        `float`: the median over the runs, in milliseconds.

    Example:

    ```python
    >>> import time
    >>> 4 < median_milliseconds(time.sleep, 0.005, seconds=0.05) < 50
    True

    ```
    """
    timer = Timer("run(*inputs)", globals={"run": run, "inputs": inputs}, num_threads=threads)
    return 1000 * timer.blocked_autorange(min_run_time=seconds).median
