"""How files that people write are read: YAML with line numbers, sections, problems in words."""
