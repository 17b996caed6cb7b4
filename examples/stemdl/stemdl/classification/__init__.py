"""Space groups from diffraction patterns: MLCommons' STEMDL classification, small."""
