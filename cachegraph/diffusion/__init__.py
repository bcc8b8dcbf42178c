"""The noise process of class-conditional diffusion: spaced timesteps, DDIM and DDPM, guidance."""
