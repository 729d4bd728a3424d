"""Back-translation as a stage of preparation: every record with its translation by a run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from lmjax.errors import UserError
from lmjax.generate.translator import Translator
from lmjax.prepare.stage import Result, judged, with_column


@dataclass(frozen=True, kw_only=True)
class BackTranslate:
    """Adds the column `translation`, or puts it in the place of the text.

    Source: Sennrich et al., arXiv:1511.06709, section 3.1: texts of the target language with
    synthetic sources. With a second translator `back` the translation is what comes back, a
    paraphrase (Edunov et al., arXiv:1808.09381, section 2).

    The weights are read once in a process. What is drawn (a `temperature` above 0) is drawn from
    (seed, the record's id), so that it does not depend on the shard that a record stands in.
    Records whose translation is empty are dropped.

    Args:
      forward: translates the texts.
      back: translates those.
      replace: whether the text is replaced.
      seed: of what is drawn.
    """

    forward: Translator
    back: Translator | None = None
    replace: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}: must be from 0 to 2**32 - 1.")

    def files(self) -> list[str]:
        """What the translations depend on beside the texts: the runs' configs and checkpoints."""
        found: list[str] = []
        for run in filter(None, (self.forward, self.back)):
            folder = Path(run.workdir)
            manifests = sorted((folder / "checkpoints").glob("*/about/metadata"))
            found += [str(folder / "config.json"), *map(str, manifests)]
        return found

    def __call__(self, records: pa.Table) -> Result:
        """Translates all records."""
        made = self.translate(records["text"].to_pylist(), records["id"].to_pylist())
        reasons = [None if text.strip() else "empty translation" for text in made]
        column = "text" if self.replace else "translation"
        out = with_column(records, column, pa.array(made, pa.large_string()))
        return judged(out, reasons, counts={"texts translated": len(made)})

    def translate(self, texts: Sequence[str], ids: Sequence[str]) -> list[str]:
        """The translations, or what comes back of them, by the ids' seeds."""
        seeds = [self._seed(name) for name in ids]
        made = self.forward.translate(texts, seeds=seeds)
        return made if self.back is None else self.back.translate(made, seeds=seeds)

    def _seed(self, name: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{self.seed} {name}".encode()).digest()[:4], "big")
