"""Clone the motion of a reference video into a new video of a prompt: python sample.py --help."""
from mcl.cli.process import run_main
from mcl.cli.sample import main

if __name__ == "__main__":
    run_main(main)
