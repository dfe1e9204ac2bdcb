"""Adapters in and out of PEFT's folders: adapter_config.json and adapter_model.safetensors."""

import hashlib
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import safetensors
from absl import logging
from etils import epath

from dgr_jax.errors import UserError, foreign, in_range, listed, shown
from dgr_jax.models.adapter import TARGETS, Adapter, Lora, adapter_specs
from dgr_jax.models.arrays import hf_names, load_arrays, problems, write_arrays
from dgr_jax.models.config import ModelConfig
from dgr_jax.models.folder import ADAPTER_CONFIG, local_folder
from dgr_jax.models.parameters import parameter_specs
from dgr_jax.models.tensor_files import TensorFiles
from dgr_jax.run import hosts
from dgr_jax.run.files import read_json, whole_folder

_WEIGHTS = "adapter_model.safetensors"
_BASE = "base_weights_sha256"
"""In the header of the weights: the base that they were trained on. PEFT passes over it."""
_READ = frozenset(("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora"))
_WITHOUT_EFFECT = frozenset(
    (
        "task_type",
        "base_model_name_or_path",
        "inference_mode",
        "revision",
        "auto_mapping",
        "peft_version",
        "init_lora_weights",  # but for those that change the base, see `_CHANGE_THE_BASE`
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "exclude_modules",  # what has an adapter, the tensors say
        "layers_pattern",
        "qalora_group_size",
        "runtime_config",
    )
)
_CHANGE_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


def load_adapter(
    path_or_hub_id: str | pathlib.Path,
    config: ModelConfig,
    base: pathlib.Path,
    *,
    mesh: jax.sharding.Mesh | None = None,
) -> Adapter:
    """Reads an adapter of PEFT's, or of ours: float32, as PEFT keeps adapters whatever their base is in.

    Args:
      path_or_hub_id: its folder, or a hub id.
      config: of the base.
      base: folder of the base. An adapter that `save_adapter` wrote knows its base's weights; of one that does not, a
        name that differs is a warning.
      mesh: each matrix is cut as the weight beside it.

    Raises:
      UserError: no adapter, one that does more than LoRA's plain product, or one of another base.
    """
    folder = local_folder(path_or_hub_id)
    said = _said(folder)
    file = folder / _WEIGHTS
    if not file.is_file():
        pickled = " (adapter_model.bin is a pickle, which is never loaded)" * (folder / "adapter_model.bin").exists()
        raise UserError(f"{folder}: no {_WEIGHTS}{pickled}; save the adapter again, as safetensors")
    files = TensorFiles(folder, single=_WEIGHTS)
    lora = _lora(said, files, config, folder)
    specs = adapter_specs(config, lora)
    wrong = problems(files, specs.values())
    expected = {name for spec in specs.values() for name in hf_names(spec)}
    wrong += [f"{name} is not part of it" for name in sorted(files.where.keys() - expected)]
    if wrong:
        advice = f"; it is of another base than {base}, or not whole: give it beside its own base ({_base_name(said)})"
        raise UserError(f"{folder}: {listed(wrong)}{advice}")
    _check_base(file, said, base)
    return Adapter(load_arrays(files, specs, mesh, jnp.dtype("float32")), lora)


def save_adapter(adapter: Adapter, path: epath.PathLike, *, config: ModelConfig, base: pathlib.Path, name: str) -> None:
    """Writes a folder that PEFT loads unchanged; float32, as PEFT keeps adapters.

    Args:
      adapter: what to write.
      path: the folder, local or gs://; it appears whole or not at all, and must not exist yet.
      config: of the base.
      base: its folder.
      name: by which the user called it.

    Raises:
      UserError: the folder exists or cannot be written.
    """
    lora = adapter.lora
    weights = parameter_specs(config)
    modules = [weights[f"layers.{target}"].hf_name.split(".")[-2] for target in lora.targets]
    with whole_folder(path, completed_by=ADAPTER_CONFIG) as folder:
        specs = adapter_specs(config, lora)
        about = {_BASE: _fingerprint(base)}
        write_arrays(adapter.arrays, specs, folder, jnp.dtype("float32"), single=_WEIGHTS, metadata=about)
        if hosts.writes():
            said = {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": name,
                "r": lora.rank,
                "lora_alpha": lora.alpha,
                "lora_dropout": lora.dropout,
                "target_modules": modules,
                "use_rslora": lora.rank_stabilised,
                "bias": "none",
                "fan_in_fan_out": False,
                "inference_mode": True,
            }
            (folder / ADAPTER_CONFIG).write_text(json.dumps(said, indent=2) + "\n")


def _said(folder: pathlib.Path) -> dict[str, Any]:
    """The folder's adapter_config.json."""
    file = folder / ADAPTER_CONFIG
    if not file.exists():
        hint = f"; give {folder / 'adapter'}" if (folder / "adapter" / ADAPTER_CONFIG).exists() else ""
        raise UserError(f"{file} does not exist; {folder} is not an adapter's folder in PEFT's format{hint}")
    said = read_json(file)
    if not isinstance(said, dict):
        raise UserError(f"{file}: not a JSON object; {folder} is not an adapter's folder in PEFT's format")
    if said.get("peft_type") != "LORA":
        raise UserError(f"{file}: `peft_type` is {shown(said.get('peft_type'))}; only LORA can be read")
    started = said.get("init_lora_weights")
    if isinstance(started, str) and started.lower().startswith(_CHANGE_THE_BASE):
        raise UserError(f"{file}: `init_lora_weights` is {shown(started)}, which changes the base; merge it with peft")
    for key, value in said.items():
        if key not in _READ | _WITHOUT_EFFECT and value not in (None, False, "none", [], {}, 0):
            raise UserError(f"{file}: `{key}` is {shown(value)}, which is not supported; merge it with peft")
    return said


def _lora(said: dict[str, Any], files: TensorFiles, config: ModelConfig, folder: pathlib.Path) -> Lora:
    """What the adapter is like; which weights it is of, its tensors say, and a list in its config must agree."""
    rank, alpha = said.get("r"), said.get("lora_alpha")
    dropout = said.get("lora_dropout") or 0.0
    file = folder / ADAPTER_CONFIG
    if not in_range(rank, 1, 1 << 20):
        raise UserError(f"{file}: `r` is {shown(rank)}; a whole number of 1 or more is needed")
    if not in_range(alpha, 0.0, 1e9) or not in_range(dropout, 0.0, 0.99):
        raise UserError(f"{file}: `lora_alpha` or `lora_dropout` is no number that it can be; fetch the adapter again")
    if said.get("use_rslora") not in (None, False, True):
        raise UserError(f"{file}: `use_rslora` is {shown(said['use_rslora'])}; true or false is needed")
    modules = {parameter_specs(config)[f"layers.{target}"].hf_name.split(".")[-2]: target for target in TARGETS}
    there = {part for name in files.where for part in name.split(".") if part in modules}
    listed = said.get("target_modules")
    if isinstance(listed, list) and {str(name).rpartition(".")[2] for name in listed} != there:
        raise UserError(
            f"{file}: `target_modules` are {shown(sorted(map(str, listed)))}, but {_WEIGHTS} has tensors of "
            f"{', '.join(sorted(there)) or 'none of the decoder'}; only {', '.join(modules)} can have an adapter: "
            "merge it with peft, or fetch it again"
        )
    if not there:
        raise UserError(f"{folder / _WEIGHTS}: no tensors of {', '.join(modules)}; fetch the adapter again")
    targets = tuple(modules[module] for module in sorted(there))
    assert isinstance(rank, int) and isinstance(alpha, int | float), "checked"
    return Lora(rank, alpha, targets, bool(said.get("use_rslora")), dropout)


def _base_name(said: dict[str, Any]) -> str:
    return shown(said.get("base_model_name_or_path"))


def _fingerprint(base: pathlib.Path) -> str:
    """sha256 over the names and contents of a model's tensors, in whatever files they lie."""
    files, digest = TensorFiles(base), hashlib.sha256()
    for name in sorted(files.where):
        value = files.slices(name)[:]
        digest.update(f"{name} {value.dtype} {value.shape}\n".encode() + value.tobytes())
    return digest.hexdigest()


def _check_base(file: pathlib.Path, said: dict[str, Any], base: pathlib.Path) -> None:
    with foreign(f"{file}: not a whole safetensors file", "fetch it again"):
        with safetensors.safe_open(file, framework="numpy") as opened:
            trained_on = (opened.metadata() or {}).get(_BASE)
    if trained_on is not None:
        if trained_on != _fingerprint(base):
            raise UserError(f"{file}: was trained on other weights than {base} has; give it beside {_base_name(said)}")
        return
    name = str(said.get("base_model_name_or_path") or "").rstrip("/").rpartition("/")[2].lower()
    if name and name not in str(base.resolve()).lower():
        logging.warning("%s: is an adapter of %s; that %s is the same model cannot be told", file, name, base)
