"""``python -m bdia_jax.plan``: the command of :mod:`bdia_jax.planning.plan`."""

from bdia_jax.planning.plan import command

if __name__ == "__main__":
    command()
