"""``python -m bdia_jax.finetune``: the command of :mod:`bdia_jax.finetuning.texts`."""

from bdia_jax.finetuning.texts import command

if __name__ == "__main__":
    command()
