"""Published settings as YAML files, one a file; `--schedule NAME` finds them by name."""
