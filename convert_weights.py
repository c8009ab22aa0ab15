"""Convert community checkpoints to one model file: python convert_weights.py --help."""
try:
    from mcl.cli.convert import command
except KeyboardInterrupt:           # while PyTorch is imported
    raise SystemExit(130) from None
command()
