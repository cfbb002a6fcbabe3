"""Folders that are whole or not there: written beside their place, listed in a manifest, moved when complete."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.utils.sha import sha_fileobj
from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME


MANIFEST_FILE = "manifest.json"


def write_manifest(folder: str | Path, **facts: str) -> None:
    """List the files of a folder with sizes and digests; written last, and in one piece."""
    folder = Path(folder)
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_FILE
    }
    write_whole(folder / MANIFEST_FILE, json.dumps({**facts, "files": files}, indent=1))


def read_manifest(folder: str | Path) -> dict:
    """Return a folder's manifest; empty where it has none, as folders of other programs."""
    try:
        return json.loads(Path(folder, MANIFEST_FILE).read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{MANIFEST_FILE} cannot be read ({error})") from error


def find_damage(folder: str | Path) -> str | None:
    """Return what is wrong with a folder that was written whole: a file that is missing, cut or changed."""
    folder = Path(folder)
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return str(error)
    for name, file in manifest.get("files", {}).items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != file["size"]:
            return f"{name} has {path.stat().st_size:,} bytes instead of {file['size']:,}"
        if _digest(path) != file["sha256"]:
            return f"{name} has changed since it was written"
    return None


def find_checkpoint_damage(folder: str | Path) -> str | None:
    """Return what is wrong with a checkpoint; one without a manifest is whole if Trainer wrote its last file."""
    damage = find_damage(folder)
    if damage is None and not Path(folder, MANIFEST_FILE).is_file():
        try:
            json.loads(Path(folder, TRAINER_STATE_NAME).read_text())
        except FileNotFoundError:
            return f"{TRAINER_STATE_NAME} is missing"
        except ValueError:
            return f"{TRAINER_STATE_NAME} is cut short"
    return damage


def check_undamaged(folder: Path) -> None:
    """Refuse a folder with a file that is missing, cut or changed."""
    if damage := find_damage(folder):
        raise ValueError(
            f"Expected {folder} as it was written, got another: {damage}. Copy it again from where it came, or go on "
            "from an earlier checkpoint (resume_from_checkpoint=True takes the newest whole one)."
        )


def write_whole(file: Path, text: str) -> None:
    """Write a file under another name and move it to its own."""
    part = file.with_name(f"{file.name}.{uuid.uuid4().hex}.part")  # two runs in one folder do not meet here
    part.write_text(text)
    os.replace(part, file)


def move_files(source: Path, target: Path) -> None:
    """Move the files of a folder into another, each in one piece, weights last."""
    files = sorted((path for path in source.rglob("*") if path.is_file()), key=lambda p: p.suffix == ".safetensors")
    for path in files:
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)
    shutil.rmtree(source)


@contextmanager
def written_whole(folder: Path, **facts: str) -> Iterator[Path]:
    """Give a folder to write into, which takes the place of `folder` when it is complete."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    write_manifest(part, **facts)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def is_disk_error(error: Exception) -> bool:
    """Return whether an error of writing a file is the disk's: full, read-only, gone."""
    of_torch = any(words in str(error) for words in ("PytorchStreamWriter", "unexpected pos"))
    return of_torch or isinstance(error, (OSError, SafetensorError))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return sha_fileobj(file).hex()
