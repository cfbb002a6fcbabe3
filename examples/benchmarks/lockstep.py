"""Time several training loops against each other in one process, a step of each in turn."""

import statistics
import threading
import time
from collections.abc import Callable

import torch
from transformers import Trainer, TrainerCallback


def now() -> float:
    """Return milliseconds: of this process, or, once the GPU is done, of the wall clock."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return 1000 * time.perf_counter()
    return 1000 * time.process_time()


class StepsOf(TrainerCallback):
    """
    Hold a trainer's own loop and let it go on by one step at a time: data, forward, backward, update, callbacks.

    The loop runs in a thread of its own, which waits at the end of each step; only one thread is ever at work.

    Args:
        make_trainer (`Callable`):
            Makes the trainer, with more steps to do than are asked for.
    """

    def __init__(self, make_trainer: Callable[[], Trainer]):
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.error: BaseException | None = None
        self.stopped = False
        self.trainer = make_trainer()
        self.trainer.add_callback(self)
        self.thread = threading.Thread(target=self._train, daemon=True)

    def _train(self) -> None:
        try:
            self.trainer.train()
        except BaseException as error:
            self.error = error
        self.done.release()

    def __call__(self) -> None:
        """Do one step; the first one starts the training."""
        if self.thread.is_alive():
            self.go.release()
        else:
            self.thread.start()
        self.done.acquire()
        if self.error is not None:
            raise self.error

    def on_step_end(self, args, state, control, **kwargs):
        self.done.release()
        self.go.acquire()
        control.should_training_stop = self.stopped

    def stop(self) -> None:
        """Let the training end."""
        self.stopped = True
        self()
        self.thread.join()


def compare(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict]:
    """
    Run all in turn, in another order each round, and relate each to the first one in the same round.

    Args:
        contenders (`dict[str, Callable]`):
            What to time, by name; the first one is the measure.
        rounds (`int`):
            How often each is timed, after some rounds to warm up.

    Returns:
        `dict[str, dict]`: by name, `milliseconds` (median), and `ratio`, `lowest` and `highest` of the rounds' ratios.
    """
    names, times, warm_up = list(contenders), {name: [] for name in contenders}, 1 + rounds // 10
    for i in range(warm_up + rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = now()
            contenders[name]()
            times[name].append(now() - start)
    for contender in contenders.values():
        if isinstance(contender, StepsOf):
            contender.stop()
    results, measure = {}, times[names[0]]
    for name, each in times.items():
        ratios = sorted(t / m for t, m in zip(each[warm_up:], measure[warm_up:], strict=True))
        results[name] = {
            "milliseconds": statistics.median(each[warm_up:]),
            "ratio": statistics.median(ratios),
            "lowest": ratios[0],
            "highest": ratios[-1],
        }
    return results
