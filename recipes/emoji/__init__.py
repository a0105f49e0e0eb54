"""The recipe of the default model, stage by stage.

data          drawings of six styles, with captions
autoencoder   pictures to latents and back
teacher       a text-conditioned UNet on the latents, as a diffusers pipeline
student       a warm start on the teacher's pictures, then VSD and KL; the export
polish        further training of the image decoder alone, at last on the errors of the student
measure, report    figures and pictures of all of them
stage         one stage as a method on the training loop of tiue.distill
presets       sizes and lengths
studies/      experiments about the method
"""
