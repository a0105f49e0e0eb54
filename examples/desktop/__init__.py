"""A desktop application around the runtime: a prompt, live previews, a gallery, and pictures that repeat themselves.

pip install --find-links dist "tiue-runtime[cpu]" tiue-emoji "PySide6-Essentials!=6.12.0"
python -m examples.desktop

artist      the thread that loads a bundle and draws
canvas      the pictures that the window shows
gallery     the row of pictures that were made
window      the window: it turns what the user does into calls of the artist
theme       colors, light and dark
latency     a program that measures how long the window keeps the user waiting
"""
