"""config.json of a Hugging Face folder, read field by field with errors that say what is wanted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmjax.errors import UserError


@dataclass(frozen=True)
class Settings:
    """The fields of a config.json; `source` is the file, for errors."""

    source: str
    fields: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Settings:
        """Raises UserError where it is missing or damaged."""
        try:
            fields = json.loads(path.read_text("utf-8"))
        except FileNotFoundError as error:
            raise UserError(
                f"{path.parent} has no {path.name}: give a folder that save_pretrained(DIR) wrote."
            ) from error
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} is damaged: {error}. Download it again.") from error
        if not isinstance(fields, dict):
            raise UserError(f"{path} is damaged: it holds no fields. Download it again.")
        return cls(str(path), fields)

    def get(self, name: str, default: Any = None) -> Any:
        """A field; the default where it is absent or null."""
        value = self.fields.get(name)
        return default if value is None else value

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number; raises UserError where it is another thing, or absent without default."""
        value = self.get(name, default)
        if type(value) is not int:
            raise UserError(f"{self.source}: {name} is {value!r}, and should be a whole number.")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number, likewise."""
        value = self.get(name, default)
        if type(value) not in (int, float):
            raise UserError(f"{self.source}: {name} is {value!r}, and should be a number.")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """True or false, likewise."""
        value = self.get(name, default)
        if type(value) is not bool:
            raise UserError(f"{self.source}: {name} is {value!r}, and should be true or false.")
        return value

    def require(self, name: str, *allowed: Any) -> None:
        """Raises UserError for a value that changes what is computed into what we lack.

        An absent field is the first of those allowed.
        """
        if name in self.fields and self.fields[name] not in allowed:
            known = " or ".join(json.dumps(value) for value in allowed)
            raise UserError(
                f"{self.source}: {name} is {json.dumps(self.fields[name])}, and only {known} can "
                "be converted: lmjax has no layer for it."
            )

    def part(self, name: str) -> Settings:
        """A field that holds fields; empty where it is absent."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise UserError(f"{self.source}: {name} is {value!r}, and should hold fields.")
        return Settings(f"{self.source}: {name}", value)

    def end_ids(self) -> Sequence[int]:
        """What ends a document: `eos_token_id`, one or several."""
        value = self.get("eos_token_id", [])
        found = value if isinstance(value, list) else [value]
        return [i for i in found if type(i) is int]
