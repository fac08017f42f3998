"""Bulk embedding with Ray Data: any number of images to Parquet shards."""
