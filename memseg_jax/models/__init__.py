"""Flax Linen modules: backbones, ASPP, attention, feature memory, and the segmentor of them all."""
