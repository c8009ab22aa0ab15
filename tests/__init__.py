"""Tests of the package, of the command line, and of the programs beside the package."""
import gc

gc.set_threshold(100_000, 20, 100)      # the libraries have many objects, which are slow to search
