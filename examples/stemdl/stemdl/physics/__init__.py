"""Electron diffraction patterns of crystals, and the potentials behind them."""
