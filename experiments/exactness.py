"""Is every integer of every block reconstructed? Counted: :mod:`measure.exactness`."""

from measure.exactness import command

if __name__ == "__main__":
    command()
