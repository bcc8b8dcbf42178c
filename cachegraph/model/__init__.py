"""A model in; a functional graph of it and its sites out."""
