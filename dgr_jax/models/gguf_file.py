"""Models of GGUF files (llama.cpp's format): weights dequantised, and their tokenizer, as a Hugging Face folder."""

import math
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from dgr_jax.errors import UserError, foreign, listed, shown
from dgr_jax.models.config import ARCHITECTURES, ModelConfig
from dgr_jax.models.export import write_model
from dgr_jax.models.gguf_tokenizer import write_tokenizer
from dgr_jax.models.parameters import parameter_specs

_FAMILIES = ("llama", "qwen2", "qwen3")
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Hugging Face's name of a module -> llama.cpp's."""
_ROPE = "rope_freqs.weight"
"""Where a Llama 3.1 file has the factors of its frequencies."""


def import_gguf(file: str | pathlib.Path, folder: str | pathlib.Path, *, dtype: str = "float32") -> ModelConfig:
    """Writes a GGUF file's model as a Hugging Face folder.

    Args:
      file: of a llama, qwen2 or qwen3 architecture, quantised or not, in one piece.
      folder: receives config, weights, tokenizer and chat template; it appears whole or not at all.
      dtype: of the weights; what is quantised is exact in float32.

    Raises:
      UserError: another architecture, pre-tokenizer or kind of tensor, a damaged file, or a folder that exists.
    """
    opened = GGUFFile(pathlib.Path(file))
    config = opened.config()
    parameters = {name: jnp.asarray(value, dtype) for name, value in opened.parameters(config)}
    with tempfile.TemporaryDirectory() as companions:
        write_tokenizer(opened.said, pathlib.Path(companions), where=str(file))
        write_model(config, parameters, folder, jnp.dtype(dtype), companions_from=companions)
    return config


class GGUFFile:
    """A file that is open.

    Args:
      path: the file.

    Attributes:
      said: its metadata, as Python values.

    Raises:
      UserError: not a GGUF file, or the package that reads them is not installed.
    """

    def __init__(self, path: pathlib.Path):
        try:
            import gguf  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UserError(f"{path}: reading it needs a package; install it: pip install 'dgr_jax[gguf]'") from error
        if not path.is_file():
            raise UserError(f"{path} does not exist; give a .gguf file")
        self._path, self._dequantize = path, gguf.quants.dequantize
        with foreign(f"{path}: not a whole GGUF file", "fetch it again"):
            reader = gguf.GGUFReader(path)
            self.said: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
            self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    def config(self) -> ModelConfig:
        """The architecture that its metadata says.

        Raises:
          UserError: one that is not implemented, or metadata that is not there.
        """
        family = self.said.get("general.architecture")
        if family not in _FAMILIES:
            raise UserError(
                f"{self._path}: general.architecture is {shown(family)}; only {', '.join(_FAMILIES)} are implemented"
            )

        def get(key: str, default: Any = None) -> Any:
            value = self.said.get(f"{family}.{key}", default)
            if value is None:
                raise UserError(f"{self._path}: has no {family}.{key}; fetch it again")
            return value

        for key in ("rope.scaling.type", "rope.scaling.factor", "attention.sliding_window", "expert_count"):
            if self.said.get(f"{family}.{key}") not in (None, 0, "none"):
                value = self.said[f"{family}.{key}"]
                raise UserError(f"{self._path}: {family}.{key} is {shown(value)}, which is not implemented")
        embedding = self._tensors.get("token_embd.weight")
        if embedding is None:
            raise UserError(f"{self._path}: has no tensor token_embd.weight; fetch it again")
        heads, width = get("attention.head_count"), get("embedding_length")
        raw = {
            "architectures": [ARCHITECTURES[family]],
            "model_type": family,
            "vocab_size": int(embedding.shape[1]),
            "hidden_size": width,
            "intermediate_size": get("feed_forward_length"),
            "num_hidden_layers": get("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": get("attention.head_count_kv", heads),
            "head_dim": get("attention.key_length", width // heads),
            "rms_norm_eps": _as_written(get("attention.layer_norm_rms_epsilon")),
            "rope_theta": _as_written(get("rope.freq_base", 10_000.0)),
            "max_position_embeddings": get("context_length"),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "eos_token_id": self.said.get("tokenizer.ggml.eos_token_id"),
        }
        if _ROPE in self._tensors:
            raw["rope_scaling"] = self._scaling(raw)
        return ModelConfig.from_hf(raw, where=str(self._path))

    def _scaling(self, raw: dict[str, Any]) -> dict[str, Any]:
        """Llama 3's scaling, of which the file has what it makes of each frequency."""
        found = self._values(_ROPE)
        frequencies = raw["rope_theta"] ** -(np.arange(0, raw["head_dim"], 2) / raw["head_dim"])
        for factor in (8.0, 32.0):
            scaling = {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
            turns = 8192 * frequencies / (2 * math.pi)
            keep = np.clip((turns - 1.0) / 3.0, 0, 1)
            expected = 1 / (keep + (1 - keep) / factor)
            if found.shape == expected.shape and np.allclose(found, expected, rtol=1e-3):
                return scaling
        raise UserError(f"{self._path}: {_ROPE} is not Llama 3's scaling of positions; no other is implemented")

    def parameters(self, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
        """Each parameter by its name in `parameter_specs`, float32, in our shape.

        Raises:
          UserError: a tensor that is absent, of another shape, or not of this architecture.
        """
        specs = parameter_specs(config)
        wanted: dict[str, list[str]] = {name: [] for name in specs}
        for name, spec in specs.items():
            for layer in range(spec.shape[0]) if spec.stacked else (None,):
                wanted[name].append(_gguf_name(spec.hf_name, layer))
        known = {tensor for tensors in wanted.values() for tensor in tensors} | {_ROPE}
        problems = [f"{tensor} is missing" for tensor in sorted(known - self._tensors.keys() - {_ROPE})]
        problems += [f"{tensor} is not part of this architecture" for tensor in sorted(self._tensors.keys() - known)]
        for name, spec in specs.items():
            for tensor in wanted[name]:
                there = self._tensors.get(tensor)
                shape = None if there is None else tuple(int(size) for size in there.shape)[::-1]
                if shape not in (None, spec.hf_shape):
                    problems.append(f"{tensor} has shape {list(shape or ())} instead of {list(spec.hf_shape)}")
        if problems:
            raise UserError(f"{self._path}: {listed(problems)}; fetch it again, or take another model")
        for name, spec in specs.items():
            values = [self._values(tensor) for tensor in wanted[name]]
            if config.family == "llama" and name in ("layers.q", "layers.k"):
                values = [_unpermuted(value, config.head_dim) for value in values]
            yield name, (np.stack(values) if spec.stacked else values[0]).reshape(spec.shape)

    def _values(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        with foreign(f"{self._path}: {name} cannot be dequantised", "take a file of another quantisation"):
            return np.asarray(self._dequantize(tensor.data, tensor.tensor_type), np.float32)


def _gguf_name(hf_name: str, layer: int | None) -> str:
    """llama.cpp's name of a tensor."""
    module, _, kind = hf_name.removeprefix("model.layers.{layer}.").rpartition(".")
    return f"{'' if layer is None else f'blk.{layer}.'}{_NAMES[module]}.{kind}"


def _unpermuted(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of q or k [heads H, D] as Hugging Face has them, which pairs halves for RoPE; llama.cpp pairs neighbours."""
    return weight.reshape(-1, head_dim // 2, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def _as_written(value: float) -> float:
    """A float32 as the number that somebody wrote: 9.999999747378752e-06 is 1e-05."""
    return float(np.format_float_scientific(np.float32(value), unique=True))
