"""Convert community checkpoints to one model file: python convert_weights.py --help."""
from mcl.cli.convert import command

if __name__ == "__main__":
    command()
