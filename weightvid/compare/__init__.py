"""Codecs, presets and quantizers side by side on one model, with the plain baselines."""
