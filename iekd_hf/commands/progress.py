"""One bar for each training of a command, or some lines where the output is no terminal."""

import sys

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerState

from ..method.trainable import ParaphraserStack
from .terminal import say


_BAR = "  {desc:17} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps, {elapsed} gone, {remaining} left{postfix}"
# Shares of the steps: how far an evaluation is at least from the line before it to have one, and from where on a line
# is written without an evaluation.
_AT_AN_EVALUATION, _WITHOUT = 0.08, 0.2


class Progress(TrainerCallback):
    """
    Show the progress of one training after another, and the last metric, in place of Trainer's bars and logs.

    Args:
        metric (`str`):
            Which metric to show, as `compute_metrics` names it, in percent.
        lines (`bool`, *optional*):
            Whether to write lines, about ten for each training, in place of a bar. By default where stderr is no
            terminal.

    Example:

    ```python
    >>> from transformers import TrainerState
    >>> progress = Progress("accuracy", lines=True)
    >>> progress.title = "teacher"
    >>> progress.line(TrainerState(max_steps=20, global_step=5), "accuracy 93.5 %")
    '  teacher             5/20 steps  accuracy 93.5 %'

    ```
    """

    def __init__(self, metric: str, lines: bool | None = None):
        self.metric = metric
        self.lines = not sys.stderr.isatty() if lines is None else lines
        self.name = ""  # of the training that comes next
        self.title = ""  # of the one that runs
        self.bar: tqdm | None = None
        self.last_line = 0  # the step of the last one
        self.is_due = False  # a line, unless an evaluation writes it

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Begin a bar."""
        if not state.is_world_process_zero:
            return
        self.title = "stage 1" if isinstance(model, ParaphraserStack) else self.name
        self.last_line, self.is_due = state.global_step, False
        if not self.lines:
            about = {"desc": self.title, "total": state.max_steps, "initial": state.global_step}
            self.bar = tqdm(**about, bar_format=_BAR, dynamic_ncols=True)

    def on_step_begin(self, args, state, control, **kwargs):
        """Write the line of the last step, if no evaluation has."""
        if self.is_due:
            self._write(state)

    def on_step_end(self, args, state, control, **kwargs):
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)
        elif self.title:
            self.is_due = state.global_step - self.last_line >= _WITHOUT * state.max_steps

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Show the metric."""
        value = (metrics or {}).get(f"eval_{self.metric}")
        if value is None or not self.title:
            return
        text = f"{self.metric} {100 * value:.1f} %"
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        elif self.last_line < state.global_step == state.max_steps or (
            state.global_step - self.last_line >= _AT_AN_EVALUATION * state.max_steps
        ):
            self._write(state, text)

    def on_train_end(self, args, state, control, **kwargs):
        """End the bar, or write a last line."""
        if self.title and self.bar is None and self.last_line < state.global_step:
            self._write(state)
        self.close()

    def close(self) -> None:
        """End the bar, also that of a training which was interrupted."""
        if self.bar is not None:
            self.bar.close()
        self.bar, self.title = None, ""

    def line(self, state: TrainerState, text: str = "") -> str:
        """Return what there is to say."""
        steps = f"{state.global_step:{len(str(state.max_steps))}}/{state.max_steps} steps"
        return f"  {self.title:17}  {steps}  {text}".rstrip()

    def _write(self, state: TrainerState, text: str = "") -> None:
        say(self.line(state, text))
        self.last_line, self.is_due = state.global_step, False
