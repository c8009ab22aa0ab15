"""Clone the motion of a reference video into a new video of a prompt: python sample.py --help."""
from mcl.cli.sample import command

if __name__ == "__main__":
    command()
