from dgr_jax.commands.app import run

if __name__ == "__main__":
    run("import_gguf")
