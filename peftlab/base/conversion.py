"""GGUF to safetensors, in a process of its own, as it takes all cores: `python -m peftlab.base.conversion GGUF TO`."""

import sys
from pathlib import Path

from .. import seam


def convert(gguf: Path, folder: Path) -> None:
    """Writes the model and the tokenizer of a GGUF file to `folder`, as transformers saves them, in bf16."""
    import torch
    from gguf import GGUFReader

    transformers = seam.library()
    unpacked = {}
    if hasattr(transformers, "GgufConfig"):  # newer releases keep GGUF weights packed unless told otherwise
        unpacked["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **unpacked
    )
    if hasattr(model.config, "quantization_config"):  # with it, saving is refused
        del model.config.quantization_config
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.clean_up_tokenization_spaces = False  # else every load warns that it would corrupt what it decodes
    begins = GGUFReader(gguf).get_field("tokenizer.ggml.add_bos_token")
    if begins and begins.contents():  # transformers before 5.23 leaves it out
        tokenizer.add_bos_token = True
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
