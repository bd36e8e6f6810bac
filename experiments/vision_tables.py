"""The vision experiments of the paper as tables: :mod:`measure.vision_tables`."""

from measure.vision_tables import command

if __name__ == "__main__":
    command()
