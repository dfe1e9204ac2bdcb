from dgr_jax.commands.app import run

run("evaluate")
