"""``python -m bdia_jax.plan``: the command of :mod:`bdia_jax.planning.command`."""

from bdia_jax.planning.command import command

if __name__ == "__main__":
    command()
