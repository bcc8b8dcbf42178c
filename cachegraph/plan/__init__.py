"""What every step does at every site, resolved before anything runs."""
