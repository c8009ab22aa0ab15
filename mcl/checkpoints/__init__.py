"""Community checkpoints, whatever they are kept in, as models of this project.

    pickles, reading    any container -> names and tensors still on disk
    formats             what a file is, by its names and shapes, and what it is not
    names, sizes        its names -> ours; its shapes -> the config
    lora                low-rank changes to weights, merged in float32
    assemble            the whole model, every tensor accounted for, written as it is read
"""
