"""Writes the model of a GGUF file (llama.cpp's format) as a Hugging Face folder, dequantised.

python scripts/import_gguf.py --input=model.gguf --output=models/mine

Architectures llama, qwen2 and qwen3. Needs the extra `gguf`: pip install 'dgr_jax[gguf]'
"""

from absl.flags import FlagValues

from dgr_jax.commands import flags


def define(given: FlagValues) -> None:
    """The command's flags."""
    flags.define(
        given,
        "output",
        required="input output",
        input=flags.text(None, "A .gguf file, in one piece."),
        dtype=flags.choice("float32", ["float32", "bfloat16"], "Dtype of the weights in the folder."),
    )


def main(given: FlagValues) -> str:
    """Writes OUTPUT."""
    from dgr_jax.models.gguf_file import import_gguf

    config = import_gguf(given.input, given.output, dtype=given.dtype)
    what = f"{config.family}, {config.num_layers} layers, {config.vocab_size} tokens, {given.dtype}"
    return f"{what}\nmodel: {given.output}"
