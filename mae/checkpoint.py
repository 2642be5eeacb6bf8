"""A stable address for the loading functions, whatever the layout of the package."""

from mae.weights.load import load, load_encoder, load_official_state_dict

__all__ = ["load", "load_encoder", "load_official_state_dict"]
