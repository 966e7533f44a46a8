"""This library's networks among timm's: ``import sparsenet.timm`` registers them.

``timm.create_model("sparsenet_100_24", num_classes=5)`` takes what timm's own models take, and any
field of ``sparsenet.Architecture``, *implementation* and *memory* as well. Names that timm has
itself (``densenet121`` and the like) stay timm's.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from sparsenet import weights, zoo
from sparsenet.architecture import Architecture
from sparsenet.extras import require
from sparsenet.model import SparseNet

registry = require("timm.models", "timm")
FIELDS = {field.name for field in dataclasses.fields(Architecture)}


def _config(name: str) -> Any:
    """What timm has to know of a network and its weights."""
    side = zoo.image_size(name)
    layout = zoo.architecture(name)
    known: dict[str, Any] = {"num_classes": layout.num_classes}
    if name in weights.shipped():
        about = weights.load_shipped(name).about
        known = {
            "file": str(weights.SHIPPED / f"{name}.safetensors"),
            "mean": about.preprocessing.mean,
            "std": about.preprocessing.std,
            "label_names": about.classes,
            "num_classes": len(about.classes),
        }
    pooled = layout.sizes(side)[-1]
    return require("timm.models._pretrained", "timm").PretrainedCfg(
        architecture=name,
        input_size=(3, side, side),
        pool_size=(pooled, pooled),
        interpolation="bilinear",
        crop_pct=1.0,
        first_conv="stem.0",
        classifier="classifier",
        license="apache-2.0",
        **known,
    )


def _build(
    name: str,
    implementation: str = "auto",
    memory: str = "normal",
    global_pool: str = "avg",
    drop_rate: float = 0.0,
    **changes: Any,
) -> SparseNet:
    architecture: Architecture = zoo.architecture(name, **changes)
    return SparseNet(architecture, implementation, memory, global_pool, drop_rate)


def _entrypoint(name: str) -> Callable[..., Any]:
    def create(pretrained: bool = False, **settings: Any) -> Any:
        changes = {key: value for key, value in settings.items() if key in FIELDS}
        features = 1 + len(zoo.architecture(name, **changes).stages)
        feature_cfg = {"feature_cls": "getter", "out_indices": tuple(range(features))}
        return registry.build_model_with_cfg(
            partial(_build, name), name, pretrained, feature_cfg=feature_cfg, **settings
        )

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"``{name}`` of ``sparsenet.list_models``."
    return create


__all__ = [name for name in zoo.NETWORKS if not registry.is_model(name)]
default_cfgs = registry.generate_default_cfgs({name: _config(name) for name in __all__})
for _name in __all__:
    setattr(sys.modules[__name__], _name, registry.register_model(_entrypoint(_name)))
