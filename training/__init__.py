"""Training of CLIP checkpoints, on drawn demo data or on a directory of captioned images."""
