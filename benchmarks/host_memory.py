"""What a host holds of a model that is spread over several: loading, a checkpoint, the export.

python benchmarks/host_memory.py [--output=FILE.json]          (processes on one machine as hosts; some minutes)

Counted is a process' own memory (RssAnon of /proc, every few milliseconds; pages of files that are read belong to no
one), less what it has before it loads. On a CPU the devices' memory is the host's, so that a host's share of the
weights is in it.
"""

import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import threading
import time

from absl import app, flags, logging

HOSTS = flags.DEFINE_list("hosts", ["1", "2", "4"], "Numbers of hosts.")
OUTPUT = flags.DEFINE_string("output", None, "File for the rows as JSON.")
DEVICES = 8
"""Of all hosts together."""
GIB = 2**30


class Watch:
    """The most memory of this process in a `with` block, in bytes above what it had before."""

    def __enter__(self) -> "Watch":
        self._before, self._most, self._over = _held(), 0, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._over.wait(0.003):
            self._most = max(self._most, _held())

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def most(self) -> int:
        return max(0, self._most - self._before)


def _held() -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def made(folder: pathlib.Path) -> int:
    """Writes a model of 1.3 GiB in float32 whose largest tensor is a small part of it; its bytes."""
    import jax

    from dgr_jax.models.config import ModelConfig
    from dgr_jax.models.decoder import init_model
    from dgr_jax.models.weights import save_pretrained

    config = ModelConfig("qwen3", 8192, 1024, 4096, 24, 16, 8, 64, qk_norm=True, tie_embeddings=True)
    model = init_model(config, 0)
    save_pretrained(model, folder, max_shard_bytes=200 * 10**6)
    return sum(x.nbytes for x in jax.tree.leaves(model))


def on_host(folder: pathlib.Path, work: pathlib.Path, count: int, index: int, port: int) -> None:
    """One host's part; prints its rows."""
    from dgr_jax.run import hosts

    if count > 1:
        hosts.join(f"localhost:{port},{count},{index}")
    import jax

    from dgr_jax.models.sharding import make_mesh
    from dgr_jax.models.weights import from_pretrained, save_pretrained
    from dgr_jax.training.checkpoints import CheckpointStore

    mesh = make_mesh("auto")
    jax.block_until_ready(jax.jit(lambda: jax.numpy.zeros(1))())
    rows = {}
    with Watch() as loading:
        model = from_pretrained(folder, mesh=mesh, dtype="float32")
        jax.block_until_ready(jax.tree.leaves(model))
    rows["loading, its share of the weights included"] = loading.most
    with Watch() as saving:
        store = CheckpointStore(work / "checkpoints")
        store.save(1, jax.tree.leaves(model))
        store.close()
    rows["a checkpoint, besides"] = saving.most
    with Watch() as exporting:
        save_pretrained(model, work / "model", max_shard_bytes=200 * 10**6)
    rows["the export, besides"] = exporting.most
    print(json.dumps(rows), flush=True)


def main(arguments: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax tells of its every step
    if len(arguments) > 1:
        folder, work, count, index, port = arguments[1:]
        return on_host(pathlib.Path(folder), pathlib.Path(work), int(count), int(index), int(port))
    found = []
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place) / "base"
        size = made(folder)
        for count in map(int, HOSTS.value):
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            environment = os.environ | {
                "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // count}",
            }  # fmt: skip
            work = pathlib.Path(place) / f"{count} {time.monotonic_ns()}"
            each = [
                subprocess.Popen(
                    [sys.executable, __file__, folder, work, str(count), str(index), str(port)],
                    env=environment, stdout=subprocess.PIPE, text=True,
                )
                for index in range(count)
            ]  # fmt: skip
            answers = [json.loads(process.communicate()[0].splitlines()[-1]) for process in each]
            for step in answers[0]:
                found.append({"hosts": count, "step": step, "bytes": max(answer[step] for answer in answers)})
    print(f"a model of {size / GIB:.2f} GiB over {DEVICES} devices; the host that holds most\n")
    print("| Hosts | Step | GiB | of the model |\n|---|---|---|---|")
    for row in found:
        print(f"| {row['hosts']} | {row['step']} | {row['bytes'] / GIB:.2f} | {row['bytes'] / size:.0%} |")
    if OUTPUT.value:
        pathlib.Path(OUTPUT.value).write_text(json.dumps({"model_bytes": size, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
