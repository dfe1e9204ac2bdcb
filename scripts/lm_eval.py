from dgr_jax.commands.lm_eval import main

if __name__ == "__main__":
    main()
