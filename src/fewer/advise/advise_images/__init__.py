"""Whether the first advice on a diffusion model stands when it is asked at length."""
