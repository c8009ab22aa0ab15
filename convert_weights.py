"""Convert community checkpoints to one model file: python convert_weights.py --help."""
from mcl.cli.convert import main
from mcl.cli.process import run_main

if __name__ == "__main__":
    run_main(main)
