"""The first blocks of a model as a model of its own: a short run that stands for a long one.

python benchmarks/cut.py MODEL FOLDER [--blocks 2]
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Load the model, drop its other blocks, save the rest with the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=2)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    model.model.layers = model.model.layers[: options.blocks]
    model.config.num_hidden_layers = options.blocks
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[: options.blocks]
    model.save_pretrained(options.folder)
    AutoTokenizer.from_pretrained(options.model).save_pretrained(options.folder)


if __name__ == "__main__":
    main()
