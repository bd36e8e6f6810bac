"""Cases tried and cases passed, for everything that should hold: :mod:`measure.reliability`."""

from measure.reliability import command

if __name__ == "__main__":
    command()
