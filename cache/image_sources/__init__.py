"""Where images come from: folders, tars, WebDataset shards, Parquet, the photographs inside scikit-image; see `cache.sources.open_source`."""
