"""Pictures from several machines, with Ray.

pip install --find-links dist "tiue-runtime[cpu,server]" tiue-emoji "ray[data,serve]==2.60.*"

serve_replicas   the server of `tiue-runtime serve`, with as many replicas as its queue needs
draw_shards      the pictures of a list of prompts, in Parquet files that can be drawn again one by one

Ray sends figures about its use to its makers. Both programs turn that off for the Ray that they start. docs/scale.md
says how to turn it off for a cluster.
"""
