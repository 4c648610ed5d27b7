"""`keye-jax verify`."""


def verify() -> None:
    raise NotImplementedError
