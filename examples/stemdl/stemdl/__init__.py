"""Electron diffraction of crystals inverted by a network: an example of jaxcomm."""
