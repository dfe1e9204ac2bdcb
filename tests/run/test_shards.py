"""Shards: whole or absent, and noticed when they are damaged."""

import pathlib
from collections.abc import Generator
from typing import Any

import pytest
from etils import epath
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dgr_jax.errors import UserError
from dgr_jax.run.shards import Shards


def record(row: int) -> dict[str, Any]:
    return {"id": row, "text": "one\u2028two\n☃"}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(total=st.integers(0, 23), size=st.integers(1, 7), data=st.data())
def test_what_is_missing_is_what_is_not_there(tmp_path: pathlib.Path, total: int, size: int, data: st.DataObject):
    folder = epath.Path(tmp_path) / "run"
    if folder.exists():
        folder.rmtree()
    every = list(Shards(folder, total, size).missing())
    assert [row for rows in every for row in rows] == list(range(total))
    present = data.draw(st.sets(st.sampled_from(range(len(every)))) if every else st.just(set()))
    shards = Shards(folder, total, size)
    for number in sorted(present):
        shards.write(every[number], map(record, every[number]))

    resumed = Shards(folder, total, size)
    left = list(resumed.missing())
    assert left == [rows for number, rows in enumerate(every) if number not in present]
    made, sealed = [], []

    def make(rows: list[int]) -> Generator[tuple[int, int]]:
        """Of each its double, in an order of their own."""
        for row in data.draw(st.permutations(rows)):
            made.append(row)
            yield row, 2 * row

    def seal(rows: range, doubles: list[int]) -> list[dict[str, Any]]:
        assert doubles == [2 * row for row in rows] and set(rows) <= set(made)
        sealed.append(rows)
        return [record(row) for row in rows]

    resumed.complete(make, seal)
    assert sorted(made) == [row for rows in left for row in rows]
    assert sorted(sealed, key=lambda rows: rows.start) == left
    assert list(resumed.missing()) == [] and list(resumed.read()) == [record(row) for row in range(total)]


def test_missing_ranges_can_be_written_while_they_are_listed(tmp_path: pathlib.Path):
    shards = Shards(epath.Path(tmp_path), 5, 2)
    for rows in shards.missing():
        shards.write(rows, map(record, rows))
    assert [r["id"] for r in shards.read()] == [0, 1, 2, 3, 4]


def test_partial_shards_are_no_shards_and_are_removed(tmp_path: pathlib.Path):
    shards = Shards(epath.Path(tmp_path), 4, 2)
    shards.write(range(2), map(record, range(2)))
    (tmp_path / "parts" / ".000001.jsonl.99999999.partial").write_text('{"id": 2}\n{"id"')
    assert list(shards.missing()) == [range(2, 4)]
    assert [f.name for f in (tmp_path / "parts").iterdir()] == ["000000.jsonl"]
    shards.write(range(2, 4), map(record, range(2, 4)))
    assert [r["id"] for r in shards.read()] == [0, 1, 2, 3]


def test_a_shard_is_not_written_when_its_rows_fail(tmp_path: pathlib.Path):
    shards = Shards(epath.Path(tmp_path), 2, 2)

    def rows():
        yield record(0)
        raise UserError("row 1 is bad")

    with pytest.raises(UserError):
        shards.write(range(2), rows())
    assert list(shards.missing()) == [range(2)] and list(tmp_path.iterdir()) == []


DAMAGES = {
    "empty": lambda content: b"",
    "cut at a line": lambda content: content.splitlines(keepends=True)[0],
    "cut within a line": lambda content: content[:-5],
    "without its end": lambda content: content[:-1],
    "a line too many": lambda content: content + b"{}\n",
    "bytes": lambda content: b"\xff" + content[1:],
    "no object": lambda content: b"7\n" * 2,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_missing(tmp_path: pathlib.Path, damage: str):
    shards = Shards(epath.Path(tmp_path), 4, 2)
    for rows in shards.missing():
        shards.write(rows, map(record, rows))
    digests = shards.digests()
    assert list(shards.differing(digests)) == [] == list(shards.missing())
    file = tmp_path / "parts" / "000001.jsonl"
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    assert list(shards.missing()) == list(shards.differing(digests)) == [range(2, 4)]


def test_a_changed_digit_is_found_once_the_digests_are_known(tmp_path: pathlib.Path):
    shards = Shards(epath.Path(tmp_path), 2, 2)
    shards.write(range(2), map(record, range(2)))
    digests = shards.digests()
    file = tmp_path / "parts" / "000000.jsonl"
    file.write_text(file.read_text().replace('"id": 1', '"id": 7'))
    assert list(shards.missing()) == [] and list(shards.differing(digests)) == [range(2)]
    file.unlink()
    assert list(shards.differing(digests)) == [range(2)]
