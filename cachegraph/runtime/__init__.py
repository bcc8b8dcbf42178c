"""Run compiled step graphs in a sampler; knows nothing of how they were made."""
