"""Memory-mapped disk cache of a frozen teacher's factors and logits."""

import copy
import hashlib
import itertools
import json
import os
import shutil
import zlib
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from datasets.fingerprint import Hasher
from huggingface_hub.utils import WeakFileLock
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..arguments import IEKDTrainingArguments
from ..data.decoded_images import DecodedImages
from ..method.objective import is_on
from .frozen import FrozenTeacher, TeacherTargets, attributes, fingerprint


logger = logging.get_logger(__name__)

# Images between two notes of what is done: what an interruption, or damage, loses at most.
_BLOCK = 1024
# A checksum of each block (views in turn), 0 where it is not done.
_DONE = "done.npy"
_COMPLETE = "complete.json"
# Configuration entries that do not change the features.
_NOT_THE_TEACHER = ("_name_or_path", "transformers_version", "architectures", "dtype", "problem_type")


class TeacherCache:
    """
    Hold the factors F_T, and the logits if a logit term is on, of K views of each image, in float16.

    Its folder is named by a digest of everything that the numbers depend on. An unfinished cache is continued, never
    read; blocks that have changed since they were written are made again.
    """

    def __init__(
        self,
        teacher: FrozenTeacher,
        images: DecodedImages,
        augmentation: nn.Module,
        args: IEKDTrainingArguments,
        accelerator: Accelerator,
    ):
        self.teacher, self.images, self.augmentation = teacher, images, augmentation
        self.args, self.accelerator = args, accelerator
        self.with_logits = is_on(args.lambda_kd)
        spec = self._spec()
        digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = Path(args.teacher_cache_dir or Path(args.output_dir) / "_teacher_cache") / digest
        self._blocks = [*itertools.product(range(args.cache_views), range(0, len(images), _BLOCK))]
        # What the main process finds holds for all ranks: they build together, or not at all. A complete cache may be
        # on a disk that cannot be written to.
        if not broadcast_object_list([accelerator.is_main_process and self._is_complete()])[0]:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            # Of several runs that want the same cache, one makes it while the others wait.
            lock = WeakFileLock(self.folder.with_suffix(".lock")) if accelerator.is_main_process else nullcontext()
            with lock:
                if not broadcast_object_list([accelerator.is_main_process and self._is_complete()])[0]:
                    self._build(spec)
        self._check_shared(_COMPLETE)
        self._arrays = self._open("r")
        size = sum(array.nbytes for array in self._arrays) / 2**20
        self.teacher.rest()
        logger.info(f"Teacher's cache: {args.cache_views} views of {len(images)} images, {size:,.0f} MiB.")

    def read(self, view: int, image_ids: torch.Tensor) -> TeacherTargets:
        """Return what the teacher gives for one view of some images."""
        rows = image_ids.numpy()
        tensors = [torch.from_numpy(array[view][rows]) for array in self._arrays]
        if self.args.device.type == "cuda":
            tensors = [tensor.pin_memory() for tensor in tensors]  # so that the copy waits for nothing
        tensors = [tensor.to(self.args.device, non_blocking=True).float() for tensor in tensors]
        logits = tensors.pop() if self.with_logits else None
        return TeacherTargets(tensors, logits)

    def _spec(self) -> dict:
        """Return everything that the numbers depend on."""
        teacher = self.teacher.teacher
        config = getattr(teacher, "config", None)
        config = config.to_dict() if isinstance(config, PreTrainedConfig) else {}
        for name in _NOT_THE_TEACHER:
            config.pop(name, None)
        return {
            "teacher": fingerprint([teacher]),
            "teacher_type": type(teacher).__name__,
            "teacher_config": json.dumps(config, sort_keys=True, default=str),
            "teacher_attributes": attributes(teacher),
            "teacher_dtype": str(self.teacher.dtype),
            "teacher_layers": self.teacher.tap.layers,
            "teacher_pixels": _digest(self.teacher.teacher_pixels),
            "knowledge": self.args.knowledge,
            "paraphrasers": fingerprint(self.teacher.paraphrasers),
            # Not the name that datasets has for them: it changes with the files' times, and not with their pixels.
            "images": [len(self.images), *self.images.shape, self.images.checksum()],
            "augmentation": _digest(self.augmentation),
            "views": self.args.cache_views,
            "mixed_precision": self.accelerator.mixed_precision,
            "with_logits": self.with_logits,
        }

    # ---- Building ----

    def _build(self, spec: dict) -> None:
        args, accelerator, blocks = self.args, self.accelerator, self._blocks
        if broadcast_object_list([accelerator.is_main_process and not self._has_files()])[0]:
            # On every rank, as ranks that share a teacher can only run it together.
            first = self._run(self.images.__getitems__([0]), view=0)
            if accelerator.is_main_process:
                self._allocate([tensor.shape[1:] for tensor in first])
        else:
            logger.info("Continuing an unfinished cache of the teacher.")
        accelerator.wait_for_everyone()
        self._check_shared(_DONE)
        arrays = self._open("r+")
        done = np.load(self.folder / _DONE, mmap_mode="r+")
        mine = range(accelerator.process_index, len(blocks), accelerator.num_processes)
        for i in mine:
            if done[i] and done[i] != _checksum(arrays, *blocks[i]):
                done[i] = 0
        size = sum(array.nbytes for array in arrays) / 2**20
        lengths = {i: min(_BLOCK, len(self.images) - blocks[i][1]) for i in mine}
        bar = tqdm(
            total=sum(lengths.values()),
            initial=sum(lengths[i] for i in mine if done[i]),
            desc=f"Caching the teacher ({size:,.0f} MiB)",
            unit=" images",
            disable=args.disable_tqdm or not accelerator.is_local_main_process or None,  # None: not into log files
        )
        open_blocks = [i for i in mine if not done[i]]
        batches = [
            (i, range(start, min(start + args.eval_batch_size, blocks[i][1] + lengths[i])))
            for i in open_blocks
            for start in range(blocks[i][1], blocks[i][1] + lengths[i], args.eval_batch_size)
        ]
        most = max(gather_object([len(batches)]))
        loader = DataLoader(
            self.images,
            batch_sampler=[list(ids) for _, ids in batches],
            collate_fn=_as_it_is,
            num_workers=args.dataloader_num_workers,
        )
        for (i, ids), batch in zip(batches, loader, strict=True):
            view, start = blocks[i]
            for array, tensor in zip(arrays, self._run(batch, view), strict=True):
                array[view, ids.start : ids.stop] = tensor.cpu().numpy()
            bar.update(len(ids))
            if ids.stop == start + lengths[i]:
                for array in arrays:
                    array.flush()
                done[i] = _checksum(arrays, view, start)  # noted only when it is on disk
                done.flush()
        for _ in range(most - len(batches) if self.teacher.sharded else 0):
            self._run(self.images.__getitems__([0]), view=0)  # for the ranks that are not done yet
        bar.close()
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            unfinished = self.folder / f"{_COMPLETE}.tmp"
            unfinished.write_text(json.dumps(spec, indent=2))
            os.replace(unfinished, self.folder / _COMPLETE)
        accelerator.wait_for_everyone()

    @torch.no_grad()
    def _run(self, batch: dict, view: int) -> list[torch.Tensor]:
        """Return F_T, and the logits, of a batch of raw pixels, in float16."""
        device = self.args.device
        pixels = batch["pixel_values"].to(device, non_blocking=True)
        pixels = self.augmentation(pixels, torch.from_numpy(batch["image_ids"]), view)
        with self.accelerator.autocast():
            factors, logits = self.teacher({self.teacher.main_input_name: pixels}, with_logits=self.with_logits)
        tensors = [tensor.half() for tensor in (*factors, *([logits] if self.with_logits else []))]
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise FloatingPointError(
                "Expected factors and logits of the teacher that float16 can hold, got NaN, infinity or more than "
                "65,504: set cache_teacher=False."
            )
        return tensors

    def _names(self) -> list[str]:
        names = [f"factors_{i}.npy" for i in range(len(self.teacher.paraphrasers))]
        return [*names, "logits.npy"] if self.with_logits else names

    def _open(self, mode: str) -> list[np.ndarray]:
        return [np.load(self.folder / name, mmap_mode=mode) for name in self._names()]

    def _is_complete(self) -> bool:
        """Return whether the cache is there, and every block of it as it was written."""
        if not (self.folder / _COMPLETE).is_file() or not self._has_files():
            return False
        arrays, done = self._open("r"), np.load(self.folder / _DONE)
        changed = [i for i, block in enumerate(self._blocks) if not done[i] or done[i] != _checksum(arrays, *block)]
        if changed:
            view, start = self._blocks[changed[0]]
            logger.warning(
                f"The teacher's cache in {self.folder} has changed since it was written: {len(changed)} of "
                f"{len(self._blocks)} blocks are made again, the first of them view {view} from image {start} on."
            )
        return not changed

    def _has_files(self) -> bool:
        """Return whether every file is there in its full length, with a note of the blocks that are done."""
        if not self.folder.is_dir():
            return False
        images, blocks = (self.args.cache_views, len(self.images)), (len(self._blocks),)
        try:
            # numpy extends a short file that is opened to be written to, and refuses one to be read.
            for name, dtype, shape in [(_DONE, "<u4", blocks), *((name, "<f2", images) for name in self._names())]:
                array = np.load(self.folder / name, mmap_mode="r")
                if array.dtype != dtype or array.shape[: len(shape)] != shape or not array.flags.c_contiguous:
                    raise ValueError(f"{name} is of another cache")
        except (OSError, ValueError, EOFError) as error:
            logger.warning(f"The teacher's cache in {self.folder} is damaged and will be made again: {error}")
            return False
        return True

    def _allocate(self, shapes_of_one: list[torch.Size]) -> None:
        """Make the files on a disk that can hold them."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shapes = [(self.args.cache_views, len(self.images), *shape) for shape in shapes_of_one]
        size = sum(2 * int(np.prod(shape)) for shape in shapes)
        self.folder.mkdir(parents=True, exist_ok=True)
        check_room(self.folder, size, self.args.cache_views, len(self.images))
        for name, shape in zip(self._names(), shapes, strict=True):
            np.lib.format.open_memmap(self.folder / name, mode="w+", dtype=np.float16, shape=shape)
            if hasattr(os, "posix_fallocate"):  # a disk that fills up meanwhile is an error now, not a crash later
                with open(self.folder / name, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, os.path.getsize(self.folder / name))
        # Last, and at once: without it the files above count for nothing.
        np.save(self.folder / "done.tmp.npy", np.zeros(len(self._blocks), np.uint32))
        os.replace(self.folder / "done.tmp.npy", self.folder / _DONE)

    def _check_shared(self, name: str) -> None:
        if not (self.folder / name).is_file():
            raise ValueError(
                "Expected every rank to see the teacher's cache that the main process makes, but rank "
                f"{self.accelerator.process_index} does not: set teacher_cache_dir to a folder that all share."
            )


def check_room(folder: Path, size: int, views: int, num_images: int) -> None:
    """Refuse a cache of more bytes than its disk has free."""
    free = shutil.disk_usage(folder).free
    if size > 0.95 * free:
        raise ValueError(
            f"Expected room for the teacher's cache, {size / 2**30:,.2f} GiB for {views} views of {num_images:,} "
            f"images, got {free / 2**30:,.2f} GiB free on its disk: lower cache_views, set teacher_cache_dir to a "
            "larger disk, or cache_teacher=False."
        )


def check_cacheable(dataset: Dataset, augmentation: nn.Module | None) -> None:
    """Refuse images whose views cannot be made again."""
    if not isinstance(dataset, DecodedImages) or augmentation is None:
        raise ValueError(
            f"Expected DecodedImages and an augmentation with cache_teacher=True, got {type(dataset).__name__} and "
            f"{type(augmentation).__name__}: only their views can be made again. Make them by "
            "DecodedImages.decode(dataset) and BatchAugmentation, or set cache_teacher=False."
        )


def check_cache_folder(args: IEKDTrainingArguments, num_images: int, image_bytes: int) -> None:
    """Refuse a folder that cannot be made, or whose disk cannot hold the cache."""
    folder = Path(args.teacher_cache_dir or args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"Expected a folder for the teacher's cache, got {str(folder)!r}, which cannot be made ({error}): set "
            "teacher_cache_dir to another."
        ) from error
    if not any(folder.rglob(_COMPLETE)):  # one that is there may be the one
        check_room(folder, image_bytes * args.cache_views * num_images, args.cache_views, num_images)


def _checksum(arrays: list[np.ndarray], view: int, start: int) -> int:
    """Return the checksum of a block: of its numbers, and of how they are read."""
    checksum = 0
    for array in arrays:
        checksum = zlib.crc32(f"{array.dtype}{array.shape}".encode(), checksum)
        checksum = zlib.crc32(array[view, start : start + _BLOCK], checksum)
    return checksum


def _digest(module: nn.Module | None) -> str:
    """Return a digest of all that a module holds, wherever its tensors are."""
    return Hasher.hash(copy.deepcopy(module).cpu() if module is not None else None)


def _as_it_is(batch: dict) -> dict:
    return batch
