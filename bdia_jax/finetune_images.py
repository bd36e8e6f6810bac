"""``python -m bdia_jax.finetune_images``: the command of :mod:`bdia_jax.finetuning.images`."""

from bdia_jax.finetuning.images import command

if __name__ == "__main__":
    command()
