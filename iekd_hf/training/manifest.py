"""Folders that are whole or not there: written beside their place, listed in a manifest, moved when complete."""

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.utils.sha import sha_fileobj
from transformers.trainer import TRAINER_STATE_NAME


MANIFEST_FILE = "manifest.json"


def write_manifest(folder: str | Path, patterns: Iterable[str] = ("**/*",), **facts) -> None:
    """List the files of a folder with sizes and digests; written last, and in one piece."""
    folder = Path(folder)
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(path for pattern in patterns for path in folder.glob(pattern))
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
    if not Path(folder).is_dir():
        return "there is no such folder"
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
            f"Expected {folder} as it was written, but {damage}: copy it again from where it came, or make it again."
        )


@contextmanager
def file_written_whole(file: Path) -> Iterator[Path]:
    """Give a name to write a file under, which becomes its own in one piece."""
    part = file.with_name(f"{file.name}.{uuid.uuid4().hex}.part")  # two runs in one folder do not meet here
    try:
        yield part
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def write_whole(file: Path, text: str) -> None:
    """Write a text file in one piece."""
    with file_written_whole(file) as part:
        part.write_text(text)


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


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return sha_fileobj(file).hex()
