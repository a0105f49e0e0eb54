"""Getting models: bundles are pulled into the user's cache, listed, removed, signed and verified.

    pull            a bundle from the Hugging Face Hub, a URL or a directory into the cache
    sources         where bundles come from
    pulled_files    the writing side of the cache: locks, publishing, removing
    signature       OpenSSF model signatures, made and verified offline

Nothing here runs unless a person or a program asks for it by name: loading a pipeline never downloads.
`tiue_runtime.bundle.pulled` is the reading side of the cache.
"""
