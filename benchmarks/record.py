"""What a benchmark leaves: a table in Markdown, and JSON that says where and when it was measured."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import shlex
import sys
from collections.abc import Iterable, Sequence
from typing import Any

RESULTS = pathlib.Path(__file__).parent / "results"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows))


def versions(*packages: str) -> dict[str, str]:
    """Versions of those that are installed."""
    installed = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    return {name: installed[name] for name in packages if name in installed}


def measured_here(title: str, rows: Sequence[dict[str, Any]], packages: Sequence[str]) -> dict[str, Any]:
    """A record of rows that this process measured on its device."""
    import jax

    return {
        "title": title,
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "cores": os.cpu_count(),
        "versions": {"python": sys.version.split()[0], **versions(*packages)},
        "command": shlex.join(["python", f"benchmarks/{pathlib.Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "rows": rows,
    }


def publish(record: dict[str, Any], shown: str, name: str, output: str | None = None) -> None:
    """Prints a table and writes the record to `output`, or to results/NAME_DEVICE.json."""
    record["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    device = record.get("device", "").lower().replace(" ", "_")
    place = pathlib.Path(output or RESULTS / f"{name}{device and '_'}{device}.json")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(record, indent=1) + "\n")
    heading = " ".join(str(record[key]) for key in ("title", "device", "versions") if key in record)
    print(f"{heading} {record['date']} `{record['command']}`\n\n{shown}\n\nwritten to {place}")
