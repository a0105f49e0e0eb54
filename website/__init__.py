"""The documentation site: `python -m website` builds it into build/site.

pages   gathers the documents, the files that they link to, and pictures into one folder
check   reads the built pages: dead links, and anything that a browser would fetch from elsewhere
"""
