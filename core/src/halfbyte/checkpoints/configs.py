"""Typed access to a checkpoint's JSON configuration: a value of another type is an error that names file and key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.checkpoints.headers import read_json
from halfbyte.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Config:
    """A JSON object in a file of the checkpoint.

    Every accessor takes spellings of one key and returns the first value that is there and not null, None (or nothing)
    if there is none; CheckpointError names the file, the key and the value that has another type.
    """

    file: Path
    values: Mapping[str, Any]
    #: The keys that lead to this object, such as "quantization_config.config_groups."; "" for the whole file.
    prefix: str = ""

    @classmethod
    def read(cls, file: Path) -> Config:
        """The JSON object that is the whole file; CheckpointError if it is something else."""
        return cls(file, read_json(file))

    def with_text_config(self) -> Config:
        """The same, and where it says nothing what it says of its language model (text_config)."""
        text = self.mapping("text_config")
        own = {key: value for key, value in self.values.items() if value is not None}
        return self if text is None else Config(self.file, {**text.values, **own}, self.prefix)

    def value(self, *keys: str) -> Any:
        """Any JSON value."""
        return self._first(keys)[1]

    def mapping(self, *keys: str) -> Config | None:
        """An object."""
        key, value = self._first(keys)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._wrong(key, value, "an object")
        return Config(self.file, value, f"{self.prefix}{key}.")

    def mappings(self, *keys: str) -> dict[str, Config]:
        """An object of objects."""
        outer = self.mapping(*keys)
        if outer is None:
            return {}
        found = {name: outer.mapping(name) for name in outer.values}
        return {name: inner for name, inner in found.items() if inner is not None}

    def texts(self, *keys: str) -> tuple[str, ...]:
        """A list of strings."""
        key, value = self._first(keys)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise self._wrong(key, value, "a list of strings")
        return tuple(value)

    def text(self, *keys: str) -> str | None:
        """A string."""
        key, value = self._first(keys)
        if value is not None and not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def integer(self, *keys: str) -> int | None:
        """An integer; true and false are none."""
        key, value = self._first(keys)
        if value is not None and type(value) is not int:
            raise self._wrong(key, value, "an integer")
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        """True or false."""
        value = self._first((key,))[1]
        if value is not None and not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return default if value is None else value

    def error(self, what: str) -> CheckpointError:
        """An error about this file, which names it."""
        return CheckpointError(f"{self.file}: {what}")

    def _first(self, keys: tuple[str, ...]) -> tuple[str, Any]:
        return next(((key, self.values[key]) for key in keys if self.values.get(key) is not None), (keys[0], None))

    def _wrong(self, key: str, value: Any, expected: str) -> CheckpointError:
        return self.error(f"{self.prefix}{key} is {value!r}, expected {expected}")
