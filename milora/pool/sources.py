"""Where the weights of a registered adapter come from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from milora.adapter_files import open_weights, read_config
from milora.adapter_validation import (
    DTYPES,
    checked_blocks,
    form_problems,
    open_folder,
    raise_all,
    tensor_forms,
)
from milora.config import MiLoRAConfig
from milora.errors import AdapterError
from milora.pool.layout import Layouts
from milora.pool.packing import pack


class FolderSource:
    """A folder on disk: MiLoRA's, or PEFT's LoRA or DoRA. Read anew on each load.

    Raises:
        FileNotFoundError: no adapter there.
        milora.AdapterError: its config cannot be used on this model. The weights are not looked at.
    """

    def __init__(self, layouts: Layouts, folder: str | os.PathLike):
        self.folder = Path(folder).absolute()
        self.layouts = layouts
        data = read_config(self.folder)
        shapes = {}
        if data["peft_type"] == "LORA":  # whose ranks and targets stand in the weights' header
            with open_weights(self.folder, None) as file:
                shapes = {key: shape for key, (shape, _) in tensor_forms(file)[1].items()}
        self.config = layouts.config(data, shapes, self.folder)
        checked_blocks(layouts, self.config, data.get("experts"), self.folder)

    def pack(self, own: Tensor | None, factors: Tensor | None) -> str | None:
        """Fill the blobs of a layout of `config`, None where one is not wanted; every check of
        `milora.load` is made.

        Returns: the digest of the factors; None where the layout has none.
        Raises:
            FileNotFoundError: the folder is gone.
            milora.AdapterError: it is damaged, or holds another adapter than when registered.
        """
        with open_folder(self.layouts.model, self.folder, self.layouts) as file:
            theirs, mine = file.config.to_dict(), self.config.to_dict()
            if differing := [key for key in theirs if theirs[key] != mine[key]]:
                raise AdapterError(
                    f"{self.folder}: has changed since it was registered: "
                    + ", ".join(f"{key} {theirs[key]!r} (was {mine[key]!r})" for key in differing)
                )
            layout = self.layouts.of(self.config)
            reading = file.read, file.checksums
            digest, problems = pack(self.layouts, layout, self.config, *reading, own, factors)
            raise_all(self.folder, problems)
        return digest


class TensorSource:
    """A configuration and its tensors in memory, by the keys that they have in a file.

    Raises:
        milora.AdapterError: they do not fit the model.
    """

    def __init__(
        self, layouts: Layouts, name: str, config: MiLoRAConfig, tensors: Mapping[str, Tensor]
    ):
        self.layouts = layouts
        self.name = f"adapter {name!r}"
        self.config = MiLoRAConfig.from_dict(config.to_dict())  # the user's may change
        self.tensors = tensors
        checked_blocks(layouts, self.config, None, self.name)
        names = {dtype: text for text, dtype in DTYPES.items()}
        forms = {
            key: (tuple(t.shape), names.get(t.dtype, str(t.dtype).removeprefix("torch.")))
            for key, t in tensors.items()
        }
        raise_all(self.name, [*form_problems(layouts.shapes(self.config), forms).values()])

    def pack(self, own: Tensor | None, factors: Tensor | None) -> str | None:
        """As `FolderSource.pack`. Raises: milora.AdapterError: NaN or Inf."""
        layout = self.layouts.of(self.config)

        def read(key: str) -> Tensor:
            return self.tensors[key].detach().to("cpu", torch.float32)

        digest, problems = pack(self.layouts, layout, self.config, read, None, own, factors)
        raise_all(self.name, problems)
        return digest
