"""Apache Beam, for those who have a runner of it: Dataflow, Flink, Spark."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from typing import Any

from lmjax.data.folder import Folder
from lmjax.errors import UserError
from lmjax.prepare.backends import pack, run_packed, unpacked
from lmjax.prepare.tasks import Done, Task


class Beam:
    """Runs tasks as the elements of a Beam pipeline.

    Its options are those of $BEAM_OPTIONS, "--runner=FnApiRunner" (this process) if it is not set.
    The workers must see the workdir, in which results are handed over.
    """

    def __init__(self, workdir: str) -> None:
        try:
            import apache_beam
        except ImportError as error:
            raise UserError("the runner beam needs `pip install apache-beam`.") from error
        self._beam: Any = apache_beam
        self._workdir = workdir
        self._options = os.environ.get("BEAM_OPTIONS", "--runner=FnApiRunner").split()

    def map(self, tasks: Sequence[Task]) -> list[Done]:
        """Runs them, shuffled so that no two are fused into one worker's chain."""
        beam = self._beam
        folder = Folder(self._workdir) / f".beam-{uuid.uuid4().hex}.tmp"
        elements = [(i, pack(task), folder.path) for i, task in enumerate(tasks)]
        options = beam.options.pipeline_options.PipelineOptions(self._options)
        try:
            with beam.Pipeline(options=options) as pipeline:
                _ = pipeline | beam.Create(elements) | beam.Reshuffle() | beam.Map(_run)
            return unpacked([folder.read(f"{i}.pickle") for i in range(len(tasks))])
        finally:
            folder.remove_all()


def _run(element: tuple[int, bytes, str]) -> None:
    number, packed, folder = element
    Folder(folder).write(f"{number}.pickle", run_packed(packed))
