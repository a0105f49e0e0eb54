"""The recipe of the default model: drawings -> autoencoder -> teacher -> student -> report."""
