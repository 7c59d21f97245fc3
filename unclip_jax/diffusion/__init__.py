"""Diffusion mathematics: schedules, the Gaussian process, guidance and samplers; no networks."""
