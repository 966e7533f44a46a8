"""Networks on the Hugging Face hub: ``from sparsenet.hub import HubNetwork``.

``HubNetwork`` is ``sparsenet.load``'s network with the methods that huggingface_hub's mixin has.
``sparsenet export RUN --format hf`` makes the folder to begin with.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsenet import addresses, weights
from sparsenet.export import check_empty, hf
from sparsenet.extras import require
from sparsenet.files import user_path
from sparsenet.library import Network, load

hub = require("huggingface_hub", "hub")

if TYPE_CHECKING:
    from huggingface_hub import ModelHubMixin
else:
    ModelHubMixin = hub.ModelHubMixin


class HubNetwork(Network, ModelHubMixin, library_name="sparsenet"):
    """A trained network that comes from a folder of the hub, and can be put there."""

    # The mixin would set one on each instance, whose fields cannot be set; weights say all there is
    # to say themselves.
    _hub_mixin_config = {"library_name": "sparsenet"}  # noqa: RUF012

    @classmethod
    def from_pretrained(  # type: ignore[override]  # what it does not know is refused
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        device: str = "auto",
        implementation: str = "auto",
    ) -> HubNetwork:
        """The network of a local folder, or of a repository ``OWNER/NAME``, at a *revision*.

        What is downloaded lies in huggingface_hub's cache, and *token* to *local_files_only* are as
        there. *device* and *implementation* are those of ``sparsenet.load``. Raises ``ValueError``
        in one line for a folder without weights, and what huggingface_hub raises where it gets
        nothing.
        """
        source = str(pretrained_model_name_or_path).removeprefix(addresses.HUB)
        folder = user_path(source).absolute()
        if not folder.is_dir():
            downloaded = hub.snapshot_download(
                source,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
                allow_patterns=[addresses.FILE, weights.CONFIG, hf.CARD],
            )
            folder = Path(downloaded)
        if not weights.in_folder(folder):
            expected = (
                f"a folder that sparsenet export --format hf has written, with {addresses.FILE}"
            )
            raise ValueError(f"{source}: expected {expected}, found none")
        network = load(folder, device=device, implementation=implementation)
        return cls(**(vars(network) | {"source": source}))

    def save_pretrained(  # type: ignore[override]  # likewise
        self,
        save_directory: str | Path,
        *,
        config: None = None,
        model_card_kwargs: None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **of_push: Any,
    ) -> str | None:
        """Writes the weights, as they were measured, and their card into a new or empty folder.

        With *push_to_hub* that is uploaded too, as *repo_id*, by default the name of the folder,
        and the address of the commit is returned. Raises ``ValueError`` in one line where there are
        files in the folder, where the model has other weights than those that were loaded, of which
        no error was measured, and for *config* and *model_card_kwargs*, which weights do not need.
        """
        folder = user_path(str(save_directory))
        self._check("save_pretrained", {"config": config, "model_card_kwargs": model_card_kwargs})
        if of_push and not push_to_hub:
            expected = f"push_to_hub=True beside {min(of_push)}"
            raise ValueError(f"save_pretrained: expected {expected}, found False")
        check_empty(folder, "save_pretrained")
        folder.parent.mkdir(parents=True, exist_ok=True)
        hf.write(folder, self.path.read_bytes(), self.about, self._card())
        return self.push_to_hub(repo_id or folder.name, **of_push) if push_to_hub else None

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads what ``save_pretrained`` writes, and returns the address of the commit.

        *options* are the mixin's, such as *private*, *token*, *branch* and *commit_message*. Raises
        ``ValueError`` as that does, before anything is made on the hub.
        """
        self._check("push_to_hub", options)
        return super().push_to_hub(repo_id, **options)

    def _card(self) -> bytes | str:
        """The card beside the weights, which somebody may have written on, or else a new one."""
        file = self.path.parent / hf.CARD
        if not file.is_file():
            return hf.card(self.name, self.about)
        content = file.read_bytes()
        try:
            content.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: expected text in UTF-8, found: {error.reason}") from None
        return content

    def _check(self, where: str, options: Mapping[str, object]) -> None:
        for name in ("config", "model_card_kwargs"):
            if options.get(name):
                expected = f"no {name}, as the weights bring their own"
                raise ValueError(f"{where}: expected {expected}, found one")
        self._card()  # raises for one that the hub would refuse later
        measured = weights.load(self.path).tensors
        now = weights.rounded(self.model.state_dict())
        same = now.keys() == measured.keys() and all(
            torch.equal(value.cpu().to(measured[name].dtype), measured[name])
            for name, value in now.items()
        )
        if not same:
            raise ValueError(
                f"{where}: expected the weights of {self.path}, whose error was measured, found "
                "changed ones, of which none was"
            )
