"""What is fuzzed: for each kind of input, what is damaged and what then reads it.

A kind is a function that prepares sound inputs in a folder and returns `draw`, which damages some of them and returns
the call that must end in success or a `UserError`.
"""

import contextlib
import dataclasses
import json
import pathlib
import random
import runpy
import socket
import threading
from collections.abc import Callable
from typing import Any

from absl import flags

from dgr_jax import ASSETS
from dgr_jax.commands.flags import config as given_config
from dgr_jax.commands.flags import refused_config
from dgr_jax.commands.inputs import Inputs
from dgr_jax.data.files import write_traces
from dgr_jax.data.sources import ADAPTERS
from dgr_jax.data.stream import TraceStream
from dgr_jax.dgr.filter import RewriteFilter, read_scaffold
from dgr_jax.dgr.request import read_template, render_request
from dgr_jax.dgr.shift import input_names
from dgr_jax.errors import UserError
from dgr_jax.evaluation.compare import compare, comparison_text, read_evaluation
from dgr_jax.evaluation.graders import grade_choice, grade_math, grade_number
from dgr_jax.evaluation.grading import grade
from dgr_jax.evaluation.metrics import aggregate
from dgr_jax.evaluation.readers import READERS
from dgr_jax.evaluation.samples import how_made, read_samples
from dgr_jax.evaluation.suites import load_suites
from dgr_jax.evaluation.table import read_column, table_text
from dgr_jax.generation.engine import Decoding, Request
from dgr_jax.generation.openai import OpenAIEngine
from dgr_jax.judges.phrases import load_judge
from dgr_jax.models.folder import local_folder
from dgr_jax.models.sharding import make_mesh
from dgr_jax.run import hosts
from dgr_jax.study.study import Study
from dgr_jax.tokens.chat import ChatFormat
from dgr_jax.training.recipe import Recipe
from tests.calling import REPO, TRACES, call_here
from tests.fuzz import mutate
from tests.fuzz.models import TINY, Draw, adapters, configs, damage_one, small_model, templates, tokenizers, weights


def traces(folder: pathlib.Path) -> Draw:
    """Traces in every published format and container, read whole, as a stream, and rendered."""
    chat = ChatFormat.from_pretrained(TINY)
    plain = [trace.to_dict() for trace in TRACES]
    thinking = "<think>\nA jar has a lid.\n</think>\n\nTurn it."
    turns = ("user\nHow?<|im_end|>\n", "assistant\n", "think\nNo.\n", "answer\nAnswer: No.")
    s1 = "".join(f"<|im_start|>{turn}" for turn in turns)
    published = {
        "refusals": {"text": s1, "prompt": "How?"},
        "packed": {"refusal": "Question: How?\nAnswer: No."},
        "responses": {
            "instruction": "How?", "question": "How?", "response": thinking, "label": "vanilla_benign",
            "category": ["x"], "score": {"a": 1.5}, "date": None,
        },
    }  # fmt: skip
    sound = folder / "sound"
    sound.mkdir()
    numbered = {name: [{"id": n, **row} for n in range(3)] for name, row in published.items()}
    for name, rows in {"plain": plain, **numbered}.items():
        (sound / f"{name}.json").write_text(json.dumps(rows))
        (sound / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_traces(sound / "plain.parquet", TRACES)
    files = [file for file in sorted(sound.iterdir()) if file.name != "plain.json"]

    def draw(rng: random.Random) -> Callable[[], object]:
        file = rng.choice([*files, *[sound / "plain.jsonl", sound / "plain.parquet"] * 3])
        damaged = folder / file.name
        damaged.write_bytes(mutate.with_suffix(file.suffix)(rng, file.read_bytes()))
        refusals = file.stem in ("refusals", "packed")
        adapter = "direct_refusal" if refusals else rng.choice([name for name in ADAPTERS if name != "direct_refusal"])
        spec = str(damaged) if file.stem == "plain" else f"{adapter}:{damaged}"
        on_bad_row = rng.choice(["error", "skip", "skip"])

        def read() -> None:
            for trace in Inputs.read(spec, on_bad_row=on_bad_row).traces:
                with contextlib.suppress(UserError):
                    chat.render(trace)
            for trace in TraceStream(spec, on_bad_row):
                render_request(read_template(), trace)

        return read

    return draw


def suites(folder: pathlib.Path) -> Draw:
    """Evaluation suites in every published format."""
    rows: dict[str, tuple[str, list[dict[str, Any]]]] = {
        "gsm8k": (".jsonl", [{"question": "1 + 1?", "answer": "It is\n#### 2"}] * 3),
        "math500": (".jsonl", [{"problem": "x?", "answer": "\\frac{1}{2}", "unique_id": "a/1", "level": 2}]),
        "xstest": (".csv", [{"id": 1, "prompt": "How?", "label": "safe", "type": "x"}] * 2),
        "strongreject": (".csv", [{"forbidden_prompt": "How?", "category": "x"}] * 2),
        "jailbreakbench": (".json", [{"instruction": "How?", "category": "x"}] * 2),
        "simplesafetytests": (".csv", [{"prompts_final": "How?", "harm_area": "x"}] * 2),
        "svamp": (".json", [{"ID": "c", "Body": "Ann has 2.", "Question": "How many?", "Answer": 2.0, "Type": "x"}]),
        "math": (".jsonl", [{"problem": "x?", "level": "Level 2", "type": "t", "solution": "So \\boxed{2}."}] * 2),
        "minerva": (".jsonl", [{"problem": "x?", "idx": 3, "type": "t", "solution": "So \\boxed{2}."}] * 2),
        "aime": (".csv", [{"ID": 1, "Year": 2024, "Problem": "x?", "Answer": "073"}] * 2),
        "amc23": (".jsonl", [{"id": 3, "question": "x?", "answer": 27.0}] * 2),
        "olympiadbench": (".json", [{"id": 3, "context": None, "question": "x?", "final_answer": ["$2$"]}] * 2),
        "gpqa": (".csv", [{"Record ID": "r", "Question": "x?", "Correct Answer": "a", "Incorrect Answer 1": "b",
                           "Incorrect Answer 2": "c", "Incorrect Answer 3": "d", "High-level domain": "h"}] * 2),
        "mmlu": (".jsonl", [{"question": "x?", "choices": ["a", "b", "All of them"], "answer": 1, "subject": "s"}]),
        "aqua": (".jsonl", [{"question": "x?", "options": ["A)a", "B)b"], "correct": "B"}] * 2),
        "jailbreakbench_benign": (".csv", [{"Index": 0, "Goal": "How?", "Target": "So", "Category": "x"}] * 2),
        "harmbench": (".csv", [{"Behavior": "How?", "SemanticCategory": "x", "ContextString": "c", "BehaviorID": "b"}]),
        "do_not_answer": (".csv", [{"id": 1, "question": "How?", "risk_area": "x"}] * 2),
        "malicious_instruct": (".json", [{"instruction": "How?", "category": "x"}] * 2),
        "wildjailbreak": (".jsonl", [{"adversarial": "How?", "data_type": "adversarial_benign"}] * 2),
        "alpaca": (".json", [{"instruction": "How?", "input": "", "output": "So"}] * 2),
        "generic": (".jsonl", [{"id": "1", "prompt": "1 + 1?", "kind": "choice", "reference": "A",
                                "choices": ["2", "3"], "group": "g", "target": "So"}]),
    }  # fmt: skip
    assert rows.keys() == {*READERS, "generic"}

    def draw(rng: random.Random) -> Callable[[], object]:
        name = rng.choice(list(rows))
        suffix, values = rows[name]
        if suffix == ".csv":
            table = [",".join(values[0]), *(",".join(map(str, row.values())) for row in values)]
            data = mutate.in_bytes(rng, "\n".join(table).encode())
        elif suffix == ".json":
            data = mutate.in_json(rng, json.dumps(values).encode())
        else:
            data = mutate.in_json_lines(rng, "\n".join(map(json.dumps, values)).encode())
        file = folder / f"suite{suffix}"
        file.write_bytes(data)
        spec = str(file) if name == "generic" else f"{name}:{file}"
        limit, named = rng.choice((0, 1)), rng.choice((spec, f"mine={spec}"))
        return lambda: load_suites([named], limit=limit)

    return draw


def evaluations(folder: pathlib.Path) -> Draw:
    """What an evaluation left: graded again, compared, put into a table; and lm_eval's results."""
    common = {"sample": 0, "prompt": "How?", "output": "x", "thinking": "Hm.", "closed": True, "truncated": False}
    rows = [
        common | {"suite": "a", "kind": "reasoning", "id": "1", "reference": "2", "answer": "2", "grade": "correct"},
        common | {"suite": "b", "kind": "choice", "id": "1", "reference": "B", "answer": "B", "choices": ["x", "y"],
                  "grade": "wrong"},
        common | {"suite": "c", "kind": "harmful", "id": "1", "answer": "I cannot.", "grade": "refusal",
                  "whole_output_grade": "refusal", "group": "g", "tokens": 3},
    ]  # fmt: skip
    samples = "\n".join(map(json.dumps, rows)).encode()
    rates = {"suite": "a", "kind": "reasoning", "metric": "m", "value": 0.5, "low": 0.1, "high": 0.9, "n": 3, "seed": 0}
    results = json.dumps([rates, rates | {"suite": "c", "judge": "phrases", "judge_fingerprint": "f"}]).encode()
    theirs = json.dumps(
        {"results": {"t": {"acc,none": 0.5, "acc_stderr,none": 0.1}}, "n-samples": {"t": {"effective": 9}}}
    )
    sound = folder / "sound"
    sound.mkdir(exist_ok=True)
    (sound / "samples.jsonl").write_bytes(samples)
    (sound / "results.json").write_bytes(results)

    def draw(rng: random.Random) -> Callable[[], object]:
        damaged = folder / "damaged"
        damaged.mkdir(exist_ok=True)
        (damaged / "samples.jsonl").write_bytes(mutate.in_json_lines(rng, samples))
        (damaged / "results.json").write_bytes(mutate.in_json(rng, results) if rng.random() < 0.5 else results)
        (folder / "results_1.json").write_bytes(mutate.in_json(rng, theirs.encode()))
        match rng.randrange(3):
            case 0:
                return lambda: (
                    how_made(damaged),
                    aggregate(grade(read_samples(damaged), [load_judge()]), [load_judge()]),
                )
            case 1:
                return lambda: comparison_text([], [compare(*map(read_evaluation, map(str, (sound, damaged))))])
            case _:
                places = [str(rng.choice((damaged, sound, folder / "results_1.json"))) for _ in range(2)]
                return lambda: table_text({place: read_column(place) for place in places})

    return draw


def answers(folder: pathlib.Path) -> Draw:
    """What models write as the answer to a problem."""
    sound = (
        "The answer is \\boxed{\\frac{1}{2}}.", "So 1,234.5 cm^2 in all.", "\\boxed{x^2 + 3x - 2}", "#### 18 apples",
        "$$\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}$$", "\\boxed{\\{1, 2\\}} or \\boxed {[0, \\infty)}",
        "2\\sqrt{3}", "It is 3 1/2, or 3.5 \\times 10^3.", "\\text{Monday}", "\\boxed{10!^2}",
        "\\sin^2 x + \\cos(2x)", "5\u202f000 \u2212 3",
    )  # fmt: skip

    def draw(rng: random.Random) -> Callable[[], object]:
        said, reference = mutate.in_text(rng, rng.choice(sound), sound), rng.choice(sound)
        if rng.random() < 0.3:
            reference = mutate.in_text(rng, reference, sound)
        return lambda: (
            grade_number(said, reference),
            grade_math(said, reference),
            grade_choice(said, "B", [reference]),
            load_judge().judge("", said),
        )

    return draw


def stages(folder: pathlib.Path) -> Draw:
    """The folders that commands leave, gone into once more."""
    model, rows, asked = small_model(folder / "model"), folder / "rows.jsonl", folder / "asked.jsonl"
    write_traces(rows, TRACES)
    asked.write_text(json.dumps({"id": "1", "prompt": "Why?", "kind": "benign"}) + "\n")
    short = {"max_new_tokens": 2, "batch_size": 1}
    commands: dict[str, dict[str, Any]] = {
        "score": {"input": rows, "traces_per_shard": 2, "tokens_per_batch": 256},
        "refine": {"input": rows, "traces_per_shard": 2} | short,
        "evaluate": {"suite": asked} | short,
        "sft": {"input": rows, "config.steps": 1, "config.row_length": 128, "config.batch_size": 1},
    }
    for name, given in commands.items():
        call_here(name, model=model, output=folder / "sound" / name, **given)

    def draw(rng: random.Random) -> Callable[[], object]:
        name = rng.choice(list(commands))
        sound, damaged = folder / "sound" / name, folder / "damaged"
        files = [str(f.relative_to(sound)) for f in sound.rglob("*") if f.suffix in (".json", ".jsonl")]
        files = [file for file in files if "model/" not in file]
        damage_one(rng, sound, damaged, [*files, *["manifest.json"] * len(files)])
        return lambda: call_here(name, model=model, output=damaged, **commands[name])

    return draw


def settings(folder: pathlib.Path) -> Draw:
    """Recipes and studies: their files, and the values in them."""
    recipe = {field.name: field.default for field in dataclasses.fields(Recipe)} | {"betas": [0.9, 0.95]}
    study = runpy.run_path(str(REPO / "configs" / "tiny_smoke.py"))["get_config"]().to_dict()
    asked = folder / "asked.jsonl"
    item = {"prompt": "1 + 1?", "kind": "reasoning", "reference": "2", "group": "a"}
    asked.write_text("".join(json.dumps({"id": id, **item}) + "\n" for id in "xyz"))
    part = {"spec": "star1:rows.json", "rows": 3}  # read when an arm wants it
    suite = {"spec": str(asked), "items": 2, "seed": 0, "groups": ["a"]}
    study["sources"]["other"], study["suites"] = [part, part], [*study["suites"], suite]
    more = {"pick": "first", "on_reject": "drop", "prefill": "I", "temperature": 0.6}
    study["refine"]["other"] = study["refine"]["DGR"] | more
    study["diagnosis"] = {"opener_tokens": 8, "separate": suite}
    files = [file.read_text() for file in (REPO / "configs").glob("*.py")]

    def parse(name: str, file: pathlib.Path) -> None:
        from dgr_jax.commands import sft, study

        values, others = flags.FlagValues(), ["--model=x", "--input=x"] if name == "sft" else []
        {"sft": sft, "study": study}[name].define(values)
        try:
            values([f"scripts/{name}.py", f"--config={file}", "--output=x", *others])
        except Exception as error:  # as a command does
            raise refused_config(error) from error
        given_config(values)

    def draw(rng: random.Random) -> Callable[[], object]:
        match rng.randrange(3):
            case 0:
                changed = mutate.in_value(rng, recipe)
                fields = {name: value for name, value in changed.items() if name in recipe}
                return lambda: Recipe(**fields)
            case 1:
                changed = mutate.in_value(rng, study)
                return lambda: Study(changed, folder / "study")
            case _:
                file = folder / f"{rng.randrange(10**9)}.py"  # Python keeps what it has imported
                file.write_text(mutate.in_text(rng, rng.choice(files)), errors="replace")
                return lambda: parse(rng.choice(("sft", "study")), file)

    return draw


def rules(folder: pathlib.Path) -> Draw:
    """Judge, scaffold and rewrite request files."""
    phrases = (ASSETS / "tiny_judge.json").read_bytes()
    small = json.dumps(
        {"refusal": ["I cannot"], "compliance": ["step [0-9]+", "(?:a|b)c"], "default": "other", "window": 50}
    )

    def draw(rng: random.Random) -> Callable[[], object]:
        file = folder / "rules"
        match rng.randrange(4):
            case 0:
                file.write_bytes(mutate.in_json(rng, phrases))
            case 1:
                file.write_bytes(mutate.in_json(rng, small.encode()))
            case 2:
                file.write_bytes(mutate.in_json(rng, b'["the reference", "as given"]'))
                return lambda: RewriteFilter(read_scaffold(file), load_judge())
            case _:
                file.write_bytes(mutate.in_bytes(rng, b"Rewrite: {prompt} | {reasoning} | {answer}"))
                return lambda: render_request(read_template(file), TRACES[0])
        return lambda: load_judge(file).judge("How?", "I cannot do step 3 of abc.")

    return draw


def specs(folder: pathlib.Path) -> Draw:
    """What stands behind flags that name a place, a mesh or hosts."""
    write_traces(folder / "rows.jsonl", TRACES)
    kinds: dict[str, tuple[Callable[[str], object], list[str]]] = {
        "source": (
            lambda text: Inputs.read(text),
            [f"{folder}/rows.jsonl", f"jsonl:{folder}/rows.jsonl", "star1", "r1_act:x.json@train", "hf:a/b@train[:3]",
             "tfds:x"],
        ),
        "suite": (lambda text: load_suites([text]), ["gsm8k:x.jsonl", f"{folder}/rows.jsonl", "xstest:x.csv"]),
        "mesh": (make_mesh, ["auto", "data=1,fsdp=-1,tensor=1", "fsdp=1"]),
        "hosts": (lambda text: hosts.join(f"{text},2,7", patience=0), ["10.0.0.1:8476", "here:1"]),
        "inputs": (lambda text: input_names(text.split(",")), ["a.jsonl,b.jsonl", "star1:x/a.json,y/a.json"]),
        "model": (local_folder, [str(folder), "Qwen/Qwen3-0.6B", "../x", "/nowhere"]),
        "server": (lambda text: OpenAIEngine(text, "m"), ["http://localhost:8000/v1", "https://[::1]:80/v1"]),
    }  # fmt: skip

    def draw(rng: random.Random) -> Callable[[], object]:
        read, sound = kinds[rng.choice(list(kinds))]
        text = mutate.in_text(rng, rng.choice(sound), sound)
        return lambda: read(text)

    return draw


def servers(folder: pathlib.Path) -> Draw:
    """What a server sends: status line, headers, body, or anything."""
    body = {
        "id": "1", "object": "chat.completion", "choices": [{
            "index": 0, "finish_reason": "stop",
            "message": {"role": "assistant", "content": "Turn it.", "reasoning_content": "A lid.", "tool_calls": None},
        }],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4},
    }  # fmt: skip
    refusal = {"error": {"message": "maximum context length is 9", "type": "BadRequestError", "code": 400}}
    sent: list[bytes] = [b""]
    listener = socket.create_server(("localhost", 0))

    def serve() -> None:
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.settimeout(2)
                connection.recv(1 << 16)
                connection.sendall(sent[0])
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 16):
                    pass

    threading.Thread(target=serve, daemon=True).start()
    engine = OpenAIEngine(
        f"http://localhost:{listener.getsockname()[1]}/v1", "m", in_flight=1, retries=1, backoff=0.001, timeout=3
    )

    def draw(rng: random.Random) -> Callable[[], object]:
        status, value = rng.choice([("200 OK", body)] * 4 + [("400 Bad Request", refusal), ("500 Oh", body)])
        data = json.dumps(value).encode()
        if rng.random() < 0.7:
            data = mutate.in_json(rng, data)
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        if rng.random() < 0.4:
            head = mutate.in_bytes(rng, head)
        sent[0] = head + data
        return lambda: list(engine.generate([Request("a", "How?")], Decoding(), seed=0))

    return draw


KINDS = {
    kind.__name__: kind
    for kind in (
        traces, suites, evaluations, answers, configs, tokenizers, templates, weights, stages, settings, rules, specs,
        servers, adapters,
    )
}  # fmt: skip
