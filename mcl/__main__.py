"""The command sample.py as a module: python -m mcl."""
from .cli.sample import command

command()
