"""Bulk embedding on Ray Data: any number of images to Parquet shards."""
