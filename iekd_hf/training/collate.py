"""Make batches of examples, and say which examples make none."""

from collections.abc import Callable, Mapping

from .labels import describe_rows


class PassBatches:
    """Collate a list of examples; pass on a batch that the data set has collated itself."""

    def __init__(self, collate: Callable):
        self.collate = collate

    def __call__(self, examples: list | Mapping) -> Mapping:
        if isinstance(examples, Mapping):
            return examples
        try:
            return self.collate(examples)
        except (RuntimeError, TypeError, ValueError) as error:
            if str(error).startswith("Expected "):
                raise
            raise ValueError(
                f"Expected examples that make one batch, got {describe_rows(examples)} ({error}): make the data "
                "set's transform return images as tensors of one size and labels as numbers, or pass data_collator."
            ) from error
