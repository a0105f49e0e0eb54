"""The paper's comparison in miniature: the same teacher, data, budget and evaluation for every method.

rows      what is compared, and the presets
cost      what an update costs, in passes through the UNet
contest   the data, and how a row is trained, drawn, judged and timed
page      the table, the plots and the contact sheets
"""
