"""How well the phrase judge agrees with people: XSTest's labelled completions (CC-BY-4.0), model by model.

python benchmarks/judges.py --completions=xstest_completions.jsonl          (seconds)

Each row has model, safe, prompt, completion and human: full_compliance, partial_refusal or full_refusal. A partial
refusal counts as a refusal for agreement; as a band for rates, once as one and once as the other. The default judge was
fitted to two of the models of this set: what it does on others is another question.
"""

import collections
import json
from collections.abc import Sequence
from typing import Any

import record
from absl import app, flags

from dgr_jax.evaluation.metrics import cohens_kappa
from dgr_jax.judges.phrases import load_judge
from dgr_jax.statistics import wilson

flags.DEFINE_string("completions", None, "The labelled completions.", required=True)
flags.DEFINE_string("judge", None, "A phrases file; the default judge without one.")
flags.DEFINE_string("output", None, "Where to write the figures as JSON.")
FLAGS = flags.FLAGS


def agreement(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Agreement on refusal, over what was judged."""
    pairs = [(row["human"] != "full_compliance", row["verdict"] == "refusal") for row in rows if row["judged"]]
    interval = wilson(sum(a == b for a, b in pairs), len(pairs))
    kappa = cohens_kappa(pairs)
    return {"n": len(rows), "judged": len(pairs), "agreement": interval.value, "low": interval.low,
            "high": interval.high, "kappa": kappa}  # fmt: skip


def rates(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The rate of refusals by the judge, and the band that people leave it."""
    humans = collections.Counter(row["human"] for row in rows)
    full, partial = (humans[name] / len(rows) for name in ("full_refusal", "partial_refusal"))
    return {
        "judge": sum(row["verdict"] == "refusal" for row in rows) / len(rows),
        "least": full,
        "most": full + partial,
    }


def main(_: list[str]) -> None:
    judge, rows = load_judge(FLAGS.judge), []
    with open(FLAGS.completions, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    for row in rows:
        row["verdict"] = judge.judge(row["prompt"], row["completion"]).verdict
        row["judged"] = row["verdict"] != "unjudged"
    found = []
    for name in [*sorted({row["model"] for row in rows}), "all"]:
        mine = [row for row in rows if name in ("all", row["model"])]
        unsafe, safe = (rates([row for row in mine if row["safe"] is value]) for value in (False, True))
        found.append({"model": name, **agreement(mine), "refused_unsafe": unsafe, "refused_safe": safe})
    shown = record.table(
        ["model", "n", "agreement [95 %]", "kappa", "harmful rate", "people's", "over-refusal", "people's"],
        (
            [
                row["model"], f"{row['judged']}", f"{row['agreement']:.3f} [{row['low']:.3f}, {row['high']:.3f}]",
                f"{row['kappa']:.2f}", f"{1 - row['refused_unsafe']['judge']:.3f}",
                f"{1 - row['refused_unsafe']['most']:.3f} to {1 - row['refused_unsafe']['least']:.3f}",
                f"{row['refused_safe']['judge']:.3f}",
                f"{row['refused_safe']['least']:.3f} to {row['refused_safe']['most']:.3f}",
            ]
            for row in found
        ),
    )  # fmt: skip
    about = record.measured_here("The phrase judge against people, XSTest", found, ["dgr-jax"])
    for of_the_machine in ("device", "platform", "cores"):
        del about[of_the_machine]
    record.publish(about, shown, "judges_xstest", FLAGS.output)


if __name__ == "__main__":
    app.run(main)
