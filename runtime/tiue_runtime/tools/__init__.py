"""The command line, `tiue-runtime`. `cli` has the commands, and each group of them has a module.

cli               the parser, and what ends a command
console           lines on stdout and stderr
flags             those that commands share: options of the library, and what a file holds
generate_command  pictures of prompts, or of a saved picture
file_names        their names: templates, defaults, no two alike
text_lines        prompts from files
progress_bar      a bar on a terminal
batch_command     pictures of many prompts, continued after a kill
batch_lines       the lines of its input
batch_directory   its pictures and their manifest
shards            tar files in webdataset's layout
completion        scripts for shells
info_command      what a bundle is
model_commands    pull, list, remove, sign, verify
serve_command     a server over HTTP
mcp_command       a server for assistants; mcp_server is its tool
doctor            the installed parts, and whether they work
bench             seconds per picture, graph by graph
"""
