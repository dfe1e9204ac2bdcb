"""llama.cpp's own server, on a Qwen3 model in Hugging Face format: `python llama_cpp_serve.py FOLDER PORT`.

llama.cpp reads GGUF alone, so the model is written as such first: for models whose tokenizer is a byte-level BPE that
splits text as GPT-2's does, as the embedded model's.
"""

import json
import pathlib
import sys
import tempfile
import threading

import gguf
import ml_dtypes  # noqa: F401  numpy then knows bfloat16
import numpy as np
import xllamacpp
from safetensors.numpy import load_file


def write_gguf(folder: pathlib.Path, path: pathlib.Path) -> None:
    """The model of `folder`, its tokenizer and its chat template as one file; weights in float32."""
    config, tokenizer = (json.loads((folder / name).read_text()) for name in ("config.json", "tokenizer.json"))
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])

    size = config["vocab_size"]
    tokens, types = [f"[unused {i}]" for i in range(size)], [gguf.TokenType.UNUSED] * size
    for token, i in tokenizer["model"]["vocab"].items():
        tokens[i], types[i] = token, gguf.TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config["num_hidden_layers"])
    for name, value in load_file(folder / "model.safetensors").items():
        theirs = names.get_name(name, try_suffixes=(".weight",))
        assert theirs is not None, name
        writer.add_tensor(theirs, value.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    folder, port = pathlib.Path(sys.argv[1]), int(sys.argv[2])
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch) / "model.gguf"
        write_gguf(folder, path)
        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.port = port
        settings.n_ctx, settings.n_parallel = 4096, 2
        # By default keys and values are rounded to float16, and some texts turn where the two likeliest tokens are
        # .004 nats apart: on some processors and not on others.
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        server = xllamacpp.Server(settings)  # serves as long as it is there
        print(server.listening_address, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
