"""Captioned pictures -> checkpoint: our own demo data, or a folder of yours."""
