"""The validation text of a run, as its config names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lmjax.config import build, from_dict
from lmjax.data.corpus import split_documents
from lmjax.data.mixture import Mixture
from lmjax.data.source import Document, read_documents
from lmjax.data.text import Text
from lmjax.errors import UserError


def held_out(workdir: str | Path) -> list[Document]:
    """The documents, or ends of documents, that the run never trained on; of a mixture, of all.

    Raises UserError where the config names no text, or its files are gone.
    """
    config = Path(workdir) / "config.json"
    try:
        node = json.loads(config.read_text())["data"]
        data = build(from_dict(node))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{error} " if isinstance(error, UserError) else ""
        raise UserError(
            f"{reason}The config of {workdir} leads to no text that was held out: name text to "
            "evaluate on, as --data=FILE_OR_FOLDER."
        ) from error
    documents = _documents(data)
    if not documents:
        raise UserError(
            f"the run of {workdir} held out no text (valid_fraction is 0): name text to evaluate "
            "on, as --data=FILE_OR_FOLDER."
        )
    return documents


def _documents(data: Any) -> list[Document]:
    if isinstance(data, Mixture):
        return [d for source in data.sources.values() for d in _documents(source)]
    if not isinstance(data, Text):
        raise UserError(
            f"the run's data is a {type(data).__name__}, whose text is not known here: name text "
            "to evaluate on, as --data=FILE_OR_FOLDER."
        )
    every = read_documents(
        data.path,
        text_field=data.text_field,
        tfds_split=data.tfds_split,
        tfds_dir=data.tfds_dir,
    )
    return split_documents(every, fraction=data.valid_fraction, by=data.split_by)[1]
