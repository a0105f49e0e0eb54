"""How the default model was made: drawings -> autoencoder -> teacher -> student -> report."""
