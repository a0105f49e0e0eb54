"""The documentation site: `python -m website` builds it into build/site.

pages       gathers the documents, the files that they link to, and pictures into one folder
docstrings  what the API page says about attributes and options
check       reads the built pages: dead links, and anything that a browser would fetch from elsewhere
wall        draws the picture at the top of the README
"""
