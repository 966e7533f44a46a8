"""Sparsely aggregated convolutional networks: topologies, an engine, training and what comes after it."""

from sparsenet.adopt import adopt, load_torchvision
from sparsenet.architecture import Architecture
from sparsenet.model import SparseNet
from sparsenet.topology import Topology
from sparsenet.zoo import create_model, list_models

__all__ = ["Architecture", "SparseNet", "Topology", "adopt", "create_model", "list_models", "load_torchvision"]
