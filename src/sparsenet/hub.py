"""Networks on the Hugging Face hub: ``from sparsenet.hub import HubNetwork``.

``HubNetwork`` is ``sparsenet.load``'s network with the methods that huggingface_hub's mixin has.
``sparsenet export RUN --format hf`` makes the folder to begin with.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsenet import weights
from sparsenet.export import check_empty, hf
from sparsenet.extras import require
from sparsenet.library import Network, load

hub = require("huggingface_hub", "hub")

if TYPE_CHECKING:
    from huggingface_hub import ModelHubMixin
else:
    ModelHubMixin = hub.ModelHubMixin


class HubNetwork(Network, ModelHubMixin, library_name="sparsenet"):
    """A trained network that comes from a folder of the hub, and can be put there.

    ``HubNetwork.from_pretrained("OWNER/NAME")`` takes the name of a repository or a local folder,
    the mixin's ``revision``, ``token``, ``cache_dir``, ``force_download`` and ``local_files_only``,
    and *device* and *implementation* as ``sparsenet.load`` does. ``save_pretrained(FOLDER)`` and
    ``push_to_hub("OWNER/NAME")`` write the weights as they were measured, with their model card.
    """

    # The mixin keeps here what made an instance, which the weights say themselves; a value of the
    # class keeps it from setting one, as the fields of a network cannot be set.
    _hub_mixin_config = {"library_name": "sparsenet"}  # noqa: RUF012

    @classmethod
    def _from_pretrained(  # type: ignore[override]  # what it does not know is refused
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        device: str = "auto",
        implementation: str = "auto",
    ) -> HubNetwork:
        """The network of a folder, or of a repository whose files are downloaded into the cache."""
        folder = Path(model_id)
        if not folder.is_dir():
            downloaded = hub.snapshot_download(
                model_id,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
                allow_patterns=[weights.FILE, weights.CONFIG, hf.CARD],
            )
            folder = Path(downloaded)
        if not weights.in_folder(folder):
            advice = f"sparsenet export {model_id} --format hf" if folder == Path(model_id) else ""
            expected = f"a folder with {weights.FILE}{advice and f', as {advice} makes one'}"
            raise ValueError(f"{model_id}: expected {expected}, found none")
        network = load(folder, device=device, implementation=implementation)
        return cls(**(vars(network) | {"source": model_id}))

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Writes a new or empty folder, as ``sparsenet export --format hf`` does.

        *options* are the mixin's; the address of a commit is returned where it was also pushed.
        Raises ``ValueError`` where there are files in it, and where the model has other weights
        than those that were loaded, of which no error was measured.
        """
        for name in ("config", "model_card_kwargs"):
            if options.get(name) not in (None, {}, self._hub_mixin_config):
                expected = f"no {name}, as both files come from the weights"
                raise ValueError(f"save_pretrained: expected {expected}, found one")
        check_empty(Path(save_directory), "save_pretrained")
        self._check_unchanged()
        return super().save_pretrained(save_directory, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads what ``save_pretrained`` writes, and returns the address of the commit.

        *options* are the mixin's, such as *private*, *token* and *commit_message*. Raises
        ``ValueError`` as that does, before anything is made on the hub.
        """
        self._check_unchanged()
        return super().push_to_hub(repo_id, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        card = self.path.parent / hf.CARD
        text = card.read_text() if card.is_file() else hf.card(self.name, self.about)
        hf.write(save_directory, self.path.read_bytes(), self.about, text)

    def _check_unchanged(self) -> None:
        measured = weights.load(self.path).tensors
        now = weights.rounded(self.model.state_dict())
        same = now.keys() == measured.keys() and all(
            torch.equal(value.cpu().to(measured[name].dtype), measured[name])
            for name, value in now.items()
        )
        if not same:
            expected = f"the weights that were loaded from {self.path}"
            raise ValueError(
                f"save_pretrained: expected {expected}, whose error was measured, found changed "
                "ones; sparsenet.fit or a weights file of them (docs/how-to/export.md) comes first"
            )
