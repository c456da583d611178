"""What every object of the ledger is: one JSON object of schema 1 that is understood whole, or not at all.

Owns the way from bytes to values and back, and what is said of bytes that are no record. Refuses to know which records there are
(`orchestrator.ledger.records`), and to read or write anything.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer

DamageKind = Literal["empty", "half_written", "newer", "older", "foreign", "damaged", "forbidden", "too_large"]
"""Why an object of a store cannot be used as the record that its key promises."""

ADVICE: dict[DamageKind, str] = {
    "empty": "put back the copy that was written, or remove it",
    "half_written": "put back the copy that was written, or remove it",
    "newer": "upgrade osctl",
    "older": "put back the copy that was written, or use the release that wrote it",
    "foreign": "it is left alone; move it to another place",
    "damaged": "put back the copy that was written",
    "forbidden": "give this user the right to read it",
    "too_large": "put back the copy that was written, or move it to another place",
}
"""What a person can do about it."""


class Damaged(Exception):
    """Bytes that are no object of this ledger. `str()` is a fact whose subject is the object; it says which field is wrong, and how."""

    def __init__(self, fact: str, kind: DamageKind):
        super().__init__(fact)
        self.kind: DamageKind = kind

    @property
    def advice(self) -> str:
        return ADVICE[self.kind]


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)
    ADDED: ClassVar[tuple[str, ...]] = ()
    """Fields that 0.1.0 did not have. They are left out while they have their default: then what an older release wrote is encoded to
    the bytes that it wrote, and what this one writes can be read by an older one."""
    schema_: Literal[1] = Field(default=1, alias="schema")

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = write(self)
        for name in self.ADDED:
            info = type(self).model_fields[name]
            if getattr(self, name) == info.get_default(call_default_factory=True):
                content.pop(info.alias or name, None)
                content.pop(name, None)
        return content

    def encode(self) -> bytes:
        """Canonical JSON: equal values give equal bytes, so that a repeated write is the same write.

        Half of a surrogate pair, as Python has it of a file name that is no UTF-8, is written as its escape: no JSON holds it.
        """
        content = self.model_dump(mode="json", by_alias=True)
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        if "\\ud" in text:
            text = json.dumps(_whole_letters(content), sort_keys=True, separators=(",", ":"))
        return text.encode() + b"\n"

    def digest(self) -> str:
        return sha256(self.encode())

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Raises Damaged."""
        try:
            record = cls.model_validate_json(data, by_alias=True, by_name=False)
        except ValidationError as error:
            raise _damage(cls, data, error) from error
        if fault := record.fault():
            raise fault
        return record

    def fault(self) -> Damaged | None:
        """What is wrong with a record that was read, beyond the types of its fields."""
        return None


def _whole_letters(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_whole_letters(name): _whole_letters(part) for name, part in value.items()}
    return [_whole_letters(part) for part in value] if isinstance(value, list) else value


def _damage(kind: type[Record], data: bytes, error: ValidationError) -> Damaged:
    """What bytes are that are no record of this kind. Looks at the bytes only now: nearly every record is whole."""
    if not data.strip(b"\0 \t\r\n"):
        return Damaged("is empty" if not data else f"is {len(data)} bytes of nothing: it was never written to its end", "empty")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        if not data.lstrip().startswith(b"{"):
            return Damaged("is not osctl's: it is no JSON object", "foreign")
        if not data.rstrip().endswith(b"}"):
            return Damaged(f"is half written: it ends after {len(data)} bytes, in the middle of a value", "half_written")
        return Damaged("was changed after it was written: it is no JSON", "damaged")
    names = {info.alias or name for name, info in kind.model_fields.items()}
    if not isinstance(content, dict) or not content.keys() & names:
        return Damaged(f"is not osctl's: it is JSON of something else than a {kind.__name__.lower()}", "foreign")
    schema = content.get("schema", 1)
    if isinstance(schema, int) and not isinstance(schema, bool) and schema != 1:
        kinds: tuple[str, DamageKind] = ("a newer osctl", "newer") if schema > 1 else ("an osctl before 0.1.0", "older")
        return Damaged(f"was written by {kinds[0]}: its schema is {schema}, and this one reads schema 1", kinds[1])
    return misfit(error)


def misfit(error: ValidationError) -> Damaged:
    """What is told of fields that do not fit: fields and names that this release does not know were written by a newer one."""
    faults = error.errors(include_url=False, include_input=False)
    place = ".".join(map(str, faults[0]["loc"])) or "content"
    if all(fault["type"] == "extra_forbidden" for fault in faults):
        return Damaged(f"was written by a newer osctl, or changed: it has the field {place}, which this one does not know", "newer")
    if all(fault["type"] in ("extra_forbidden", "literal_error", "union_tag_invalid") for fault in faults):
        return Damaged(f"was written by a newer osctl, or changed: this one does not know its {place} ({faults[0]['msg']})", "newer")
    return Damaged(f"was changed after it was written: {place}: {faults[0]['msg']}", "damaged")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
