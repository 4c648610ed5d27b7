"""`python -m keye_jax.cli` is `keye-jax`."""

from keye_jax.cli import main

if __name__ == "__main__":
    main()
