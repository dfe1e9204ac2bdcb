"""Temporary memory of the kernels' programs, by the compilers of devices that need not be here.

make compiled-memory       (a few minutes)
"""

from typing import Any

import record
from targets import DEVICES, IMPLEMENTATION, MODELS, attention_program, token_scores_program

LENGTH = 32_768


def main() -> None:
    """Prints the table and writes benchmarks/results/compiled_memory.json."""
    rows = []
    for name, shapes in MODELS.items():
        for operation, program, naive in (
            ("attention", attention_program, 4 * shapes.N * LENGTH**2),
            ("token scores", token_scores_program, 4 * LENGTH * shapes.V),
        ):
            row: dict[str, Any] = {"operation": operation, "model": name, "scores or logits": naive / 2**20}
            for device in DEVICES:
                for gradient in (False, True):
                    compiled = program(device, shapes, LENGTH, IMPLEMENTATION[device], gradient=gradient)
                    temporary = compiled.memory_analysis().temp_size_in_bytes
                    row[f"{device}{' + gradient' if gradient else ''}"] = round(temporary / 2**20, 1)
            rows.append(row)
    cells = ([x if isinstance(x, str) else f"{x:,.0f}" for x in row.values()] for row in rows)
    found = {
        "title": f"MiB of temporary memory, {LENGTH} tokens in one row, bfloat16",
        "versions": record.versions("jax", "libtpu", "jax-cuda13-plugin"),
        "command": "make compiled-memory",
        "rows": rows,
    }
    record.publish(found, record.table(list(rows[0]), cells), "compiled_memory")


if __name__ == "__main__":
    main()
