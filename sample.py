"""Clone the motion of a reference video into a new video of a prompt: python sample.py --help."""
try:
    from mcl.cli.sample import command
except KeyboardInterrupt:           # while PyTorch is imported
    raise SystemExit(130) from None
command()
