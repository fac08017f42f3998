"""Export of CLIP checkpoints to bundles. Of the served packages, only this one needs torch."""
