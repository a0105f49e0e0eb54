"""An image encoder that shares its space with texts, trained on drawings: the evaluation's eye for small pictures.

    encoder_config  sizes and settings
    sentences       texts => vectors, by a fixed text encoder
    network         pictures and those vectors => embeddings in one space; reading and writing it
    augment         random changes of a drawing after which it still shows the same
    contrastive     what is trained, on the training loop of `tiue.distill`
    retrieval       training one, and measuring it

`python -m evaluation.encoder` trains one and reports how well it finds the concept of drawings that it never saw.
"""
