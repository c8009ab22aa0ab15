"""Model files of this project, and the conversion of community checkpoints to them.

- model_file: the project's own format
- pickles, containers: any container -> keys and tensors that are still on disk
- detect: what a file is, by its keys and shapes
- key_mapping, infer_config: its keys -> this project's names; its shapes -> the config
- lora, lora_math: changes of weights, merged in float32
- convert, from_state_dicts: the whole model, with every tensor accounted for
"""
