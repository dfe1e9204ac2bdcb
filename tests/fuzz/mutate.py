"""Damage: to bytes, to text, and to the values of JSON."""

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

PIECES = (
    b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\n", b"\r\n", b'"', b"\\", b"{", b"}", b"[", b"]", b",",
    b"-1", b"null", b"NaN", b"Infinity", b"1e999", b"99999999999999999999", b"\xe2\x80\xa8", b"\\ud800",
    b"{{", b"{%", b"<|im_end|>",
    b"</think>", b"..", b"../../etc/passwd", b"/", b":", b"@", b"%s", b"A" * 3000,
)  # fmt: skip
"""What has tripped readers of text."""

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 2**70, 10**400, 0.5, -0.5, 1e308, float("nan"), float("inf"), "",
    " ", "x", "\ud800", "\0", "</think>", "x" * 5000, "../x", "1", "true", "[", [], {}, [None], [[]], {"": None},
    {"a": {"b": {}}}, ["x", 1, None], [0] * 2000,
)  # fmt: skip
"""What stands in a file in place of what should."""


def in_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to four damages of any kind."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        begin = rng.randrange(len(data) + 1)
        end = min(len(data), begin + rng.choice((0, 1, 1, 4, 30, len(data))))
        match rng.randrange(6):
            case 0:
                data = data[:begin] + data[end:]
            case 1:
                data = data[:begin] + rng.choice(PIECES) + data[end:]
            case 2:
                data = data[:begin] + rng.randbytes(end - begin) + data[end:]
            case 3:
                data = data[:begin] + data[begin:end] * 2 + data[end:]
            case 4 if begin < len(data):
                data = data[:begin] + bytes([data[begin] ^ 1 << rng.randrange(8)]) + data[begin + 1 :]
            case _:
                data = data[:begin]
    return data


def in_text(rng: random.Random, text: str, others: Sequence[str] = ()) -> str:
    """One to four damages that leave characters whole; `others` give pieces."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        begin = rng.randrange(len(text) + 1)
        end = min(len(text), begin + rng.choice((0, 1, 8, 60)))
        piece = rng.choice([*others, rng.choice(PIECES).decode("utf-8", "replace")])
        if len(piece) > 60:
            place = rng.randrange(len(piece) - 50)
            piece = piece[place : place + rng.choice((10, 50))]
        text = text[:begin] + rng.choice(("", piece, piece, text[begin:end] * 2)) + text[end:]
    return text


def in_value(rng: random.Random, value: Any) -> Any:
    """A copy of a JSON value in which one to four nodes are something else, gone, renamed or deep."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 4))):
        places = _places(value)
        holder, key = rng.choice(places) if places else ([value], 0)
        match rng.randrange(7):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[rng.choice(("", "x", f"{key}_", str(key).upper()))] = holder.pop(key)
            case 2:
                other, its = rng.choice(places) if places else (holder, key)
                holder[key] = json.loads(json.dumps(other[its])) if its in _keys(other) else None
            case 3 if isinstance(holder[key], str):
                holder[key] = in_text(rng, holder[key])
            case 4 if isinstance(holder[key], int | float):
                holder[key] = holder[key] * rng.choice((-1, 0, 2, 1000)) + rng.choice((-1, 0, 1))
            case 5:
                holder[key] = _deep(rng, holder[key])
            case _:
                holder[key] = json.loads(json.dumps(rng.choice(VALUES)))  # its own, that others may change
        if not places:
            value = holder[0] if holder else None
    return value


def in_json(rng: random.Random, data: bytes) -> bytes:
    """A JSON file with other values, or with damaged bytes."""
    if rng.random() < 0.3:
        return in_bytes(rng, data)
    return json.dumps(in_value(rng, json.loads(data))).encode()


def in_json_lines(rng: random.Random, data: bytes) -> bytes:
    """The same of a file with a JSON value per line."""
    if rng.random() < 0.3:
        return in_bytes(rng, data)
    lines = data.splitlines()
    number = rng.randrange(len(lines))
    lines[number] = in_json(rng, lines[number])
    return b"\n".join(lines) + b"\n"


def with_suffix(suffix: str) -> Callable[[random.Random, bytes], bytes]:
    """The damage that hurts a kind of file most."""
    return {".json": in_json, ".jsonl": in_json_lines}.get(suffix, in_bytes)


def _keys(holder: Any) -> Sequence[Any]:
    return list(holder) if isinstance(holder, dict) else range(len(holder))


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every node but the root, as its holder and key."""
    found: list[tuple[Any, Any]] = []
    left = [value]
    while left and len(found) < 5000:
        holder = left.pop()
        for key in _keys(holder) if isinstance(holder, dict | list) else ():
            found.append((holder, key))
            left.append(holder[key])
    return found


def _deep(rng: random.Random, value: Any) -> Any:
    for _ in range(rng.choice((1, 3, 200))):
        value = [value] if rng.random() < 0.5 else {"x": value}
    return value
