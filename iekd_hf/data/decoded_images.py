"""Images of one size that are decoded once and then read, memory-mapped, a whole batch at a time."""

from collections.abc import Callable

import datasets
import numpy as np
import pyarrow
import pyarrow.compute as pc
import torch
from datasets.fingerprint import Hasher
from torch.utils.data import Dataset

from .rgb import explain_undecodable, to_rgb


# Rows are written to disk together up to this size; a batch is read with one copy from each such piece it touches.
_PIECE_BYTES = 64 * 2**20


class DecodedImages(Dataset):
    """
    Hold decoded images as raw bytes in an Arrow table, and give whole batches of them to a DataLoader.

    A batch is `{"pixel_values": uint8 (batch_size, channels, height, width), "labels": int64 (batch_size,),
    "image_ids": int64 (batch_size,)}`. Our trainers turn it into the model's input on the training device, by their
    `augmentation`.

    Args:
        table (`datasets.Dataset`):
            What [`decode`] has made: a column `pixels` of bytes, `shape`, and perhaps `labels`.

    Example:

    ```python
    >>> import datasets, PIL.Image
    >>> from iekd_hf import DecodedImages
    >>> rows = {"image": [PIL.Image.new("RGB", (6, 4), "red")] * 3, "label": [0, 1, 0]}
    >>> images = DecodedImages.decode(datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()))
    >>> len(images), images.shape
    (3, (3, 4, 6))
    >>> batch = images.__getitems__([2, 1])
    >>> batch["pixel_values"].shape, batch["labels"], batch["image_ids"]
    (torch.Size([2, 3, 4, 6]), tensor([0, 1]), array([2, 1]))

    ```
    """

    def __init__(self, table: datasets.Dataset):
        if table._indices is not None:  # rows that were selected, shuffled or split: bytes are read as they lie
            table = table.flatten_indices()
        self.table = table
        self.shape = tuple(table[0]["shape"])
        length = int(np.prod(self.shape))
        self._pieces = []
        for chunk in table.data.column("pixels").chunks:
            if len(chunk):
                _, offsets, values = chunk.buffers()
                offsets = np.frombuffer(offsets, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
                values = np.frombuffer(values, np.uint8)[offsets[0] : offsets[-1]]  # no copy
                self._pieces.append(values.reshape(len(chunk), length))
        self._ends = np.cumsum([len(piece) for piece in self._pieces])
        self._labels = None
        if "labels" in table.column_names:
            self._labels = _as_tensor(table.select_columns("labels"))

    def __reduce__(self):
        return type(self), (self.table,)  # a worker maps the file itself

    def checksum(self) -> str:
        """Return a checksum of all pixels."""
        return Hasher.hash_bytes(self._pieces)

    @classmethod
    def decode(
        cls,
        dataset: datasets.Dataset,
        prepare: Callable[[list], np.ndarray] | None = None,
        image_column: str = "image",
        label_column: str = "label",
    ) -> "DecodedImages":
        """
        Decode the images of a data set; `datasets` keeps the result in its cache.

        Args:
            dataset (`datasets.Dataset`):
                With a column of images.
            prepare (`Callable`, *optional*):
                Turns a list of PIL images into a uint8 array `(batch_size, channels, height, width)`. By default they
                are taken as RGB (16-bit and float ones scaled, transparent ones on white), and must all be of one
                size.
            image_column (`str`, *optional*, defaults to `"image"`):
                The column of images.
            label_column (`str`, *optional*, defaults to `"label"`):
                The column of labels; there may be none.

        Returns:
            `DecodedImages`

        Raises:
            `ValueError`: images of different sizes, no images, or one that cannot be decoded.
        """
        if not isinstance(dataset, datasets.Dataset):
            raise ValueError(
                f"Expected a datasets.Dataset to decode, got {type(dataset).__name__}: pass a split of a DatasetDict, "
                "or make one by datasets.Dataset.from_list."
            )
        if len(dataset) == 0:
            raise ValueError("Expected images to decode, got an empty dataset: check its file or split.")
        if image_column not in dataset.column_names:
            raise ValueError(
                f"Expected a column {image_column!r} of images, got {', '.join(dataset.column_names)}: name it in "
                "image_column."
            )
        dataset = dataset.with_format(None)
        feature = dataset.features[image_column]
        if isinstance(feature, datasets.Image):  # decoded here, where an image that cannot be is known by its row
            dataset = dataset.cast_column(image_column, datasets.Image(mode=feature.mode, decode=False))
        decoder = _Decoder(
            prepare, image_column, label_column if label_column in dataset.column_names else None, feature
        )
        shape = decoder.pixels(dataset[:1][image_column], [0])[0].shape
        features = {"pixels": datasets.Value("binary"), "shape": datasets.List(datasets.Value("int32"))}
        if decoder.label_column:
            check_labels(dataset, label_column)
            features["labels"] = dataset.features[label_column]
        table = dataset.map(
            decoder,
            batched=True,
            batch_size=256,
            with_indices=True,
            fn_kwargs={"shape": shape},
            remove_columns=dataset.column_names,
            features=datasets.Features(features),
            writer_batch_size=max(_PIECE_BYTES // int(np.prod(shape)), 1),
            desc="Decoding images",
        )
        return cls(table)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict:
        """Return a batch, which torch's DataLoader asks for as a whole."""
        ids = np.asarray(indices, dtype=np.int64)
        if len(ids) and not (ids.min() >= 0 and ids.max() < len(self)):
            raise IndexError(f"Expected indices from 0 to {len(self) - 1}, got {ids.min()} to {ids.max()}.")
        pixels = np.empty((len(ids), int(np.prod(self.shape))), np.uint8)
        piece_of = np.searchsorted(self._ends, ids, side="right")
        for number in np.unique(piece_of):
            piece, rows = self._pieces[number], np.flatnonzero(piece_of == number)
            pixels[rows] = piece[ids[rows] - (self._ends[number] - len(piece))]
        batch = {"pixel_values": torch.from_numpy(pixels).view(-1, *self.shape)}
        if self._labels is not None:
            batch["labels"] = self._labels[torch.from_numpy(ids)]
        # On the host, as numpy: what is looked up by them there need not wait for the device.
        return {**batch, "image_ids": ids}


def check_labels(dataset: datasets.Dataset, column: str) -> None:
    """Refuse labels that are missing, or that are no numbers."""
    labels = dataset.with_format("arrow").select_columns([column])[:].column(column)
    if labels.null_count:
        row = labels.is_null().index(True).as_py()
        raise ValueError(
            f"Expected a label in every row, got none in row {row} of column {column!r} ({labels.null_count} of "
            f"{len(labels)} rows): remove these rows, or give them the label -100, which no loss counts."
        )
    numbers = labels.type
    if pyarrow.types.is_list(numbers) or pyarrow.types.is_large_list(numbers):
        numbers, lengths = numbers.value_type, set(pc.list_value_length(labels).unique().to_pylist())
        if len(lengths) > 1:
            raise ValueError(
                f"Expected as many labels in every row of column {column!r}, 0 or 1 for each, got {min(lengths)} to "
                f"{max(lengths)}."
            )
    if pyarrow.types.is_temporal(numbers):
        raise ValueError(f"Expected numbers in column {column!r}, got {numbers}: leave it out, or make classes of it.")
    if pyarrow.types.is_string(labels.type) or pyarrow.types.is_large_string(labels.type):
        raise ValueError(
            f"Expected numbers in column {column!r}, got strings such as {labels[0].as_py()!r}: make classes of them "
            f"by dataset.class_encode_column({column!r})."
        )


def _as_tensor(labels: datasets.Dataset) -> torch.Tensor:
    """Return classes as int64, targets of a regression and several labels an image as float32."""
    values = torch.from_numpy(np.stack(labels.with_format("numpy")[:]["labels"]))
    return values.float() if values.is_floating_point() or values.ndim > 1 else values.long()


class _Decoder:
    """A function of `Dataset.map` whose hash, and so the cache's name, depends on what it does."""

    def __init__(self, prepare, image_column: str, label_column: str | None, feature):
        self.prepare, self.image_column, self.label_column = prepare, image_column, label_column
        self.feature = feature

    def pixels(self, images: list, rows: list[int]) -> list[np.ndarray]:
        if isinstance(self.feature, datasets.Image):
            images = [self.decode(image, row) for image, row in zip(images, rows, strict=True)]
        if self.prepare is not None:
            return list(self.prepare(images))
        return [np.asarray(to_rgb(image)).transpose(2, 0, 1) for image in images]

    def decode(self, image: dict | None, row: int):
        try:
            decoded = self.feature.decode_example(image)
            return to_rgb(decoded) if self.prepare is None else decoded
        except Exception as error:  # decoders raise errors of many kinds
            raise ValueError(explain_undecodable(image, f"row {row}", error)) from error

    def __call__(self, rows: dict, indices: list[int], shape: tuple[int, ...]) -> dict:
        pixels = self.pixels(rows[self.image_column], indices)
        for index, image in zip(indices, pixels, strict=True):
            if image.shape != tuple(shape) or image.dtype != np.uint8:
                raise ValueError(
                    f"Expected uint8 images of one size, {tuple(shape)} as the first one, got {image.dtype} "
                    f"{image.shape} in row {index}: pass prepare=, which brings them to one size, or use the data set "
                    "with an image processor, image by image."
                )
        columns = {"pixels": [image.tobytes() for image in pixels], "shape": [list(shape)] * len(pixels)}
        if self.label_column:
            columns["labels"] = rows[self.label_column]
        return columns
