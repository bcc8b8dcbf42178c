"""The published caching methods: what each computes when."""
