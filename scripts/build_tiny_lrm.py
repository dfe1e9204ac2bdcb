from dgr_jax.commands.app import run

run("build_tiny_lrm")
