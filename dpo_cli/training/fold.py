"""An SFT adapter folded into a new base, on which DPO trains a fresh LoRA: `model.adapter_into_base`.

For adapters that DPO can't go on from, or that vLLM does not serve: DoRA, whole modules, trained tokens and biases, a
resized vocabulary. The new base stands beside the adapter and is the reference; training, evaluation, serving and
pushing take it in the place of base and adapter. Needs no torch until it is made.
"""

import shutil
from pathlib import Path

from msgspec.structs import replace

from dpo_cli.adapter import weights_path
from dpo_cli.config.settings import Config
from dpo_cli.data.files import read_json, write_json
from dpo_cli.errors import UserError
from dpo_cli.models.base_model import file_sha256, weights_fingerprint
from dpo_cli.progress import Progress
from dpo_cli.training.run_folder import merged_folder

MARK = "folded.json"  # beside the weights: what they were made of


def folded(config: Config) -> Config:
    """The settings with the new base in the place of base and adapter, where the adapter is to be folded.

    Raises:
        UserError: it is not made yet.
    """
    if not (config.model.adapter_into_base and config.model.adapter):
        return config
    folder = merged_folder(Path(config.model.adapter))
    if not (folder / MARK).is_file():
        raise UserError("the adapter is not folded into its base yet", where=str(folder), hint="nothing-dpo train")
    return _on(config, folder)


def fold_base(config: Config, base: Path, texts: list[str], progress: Progress) -> Config:
    """As `folded`, once the new base is made; what was made of the same weights before is taken.

    Args:
        config: names the adapter.
        base: its base's folder.
        texts: on which base and adapter are compared with what they become.
        progress: is told what was made.
    """
    if not (config.model.adapter_into_base and config.model.adapter):
        return config
    adapter = Path(config.model.adapter)
    folder = merged_folder(adapter)
    made_of = {"base": weights_fingerprint(base), "adapter": file_sha256(weights_path(adapter))}
    mark = folder / MARK
    if not (mark.is_file() and read_json(mark) == made_of):
        from dpo_cli.training.merge_adapter import merge

        shutil.rmtree(folder, ignore_errors=True)
        made = merge(base, adapter, folder, texts, config.model)
        write_json(mark, made_of)
        progress.log(f"{adapter} is folded into {folder}, {made.mean_difference:.1e} nats a token from it")
        if made.note:
            progress.log(made.note)
    return _on(config, folder)


def _on(config: Config, folder: Path) -> Config:
    model = replace(config.model, base=str(folder), adapter=None, adapter_into_base=False, chat_template=None)
    return replace(config, model=model)
