from dgr_jax.commands import lm_eval

lm_eval.main()
