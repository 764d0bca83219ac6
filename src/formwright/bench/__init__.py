"""The bench: measure one model, compare many, report what was found.

measure     parameters, FLOPs, latency, peak memory, bytes on disk
compare     a grid of parts x seeds at equal budgets, resumable
statistics  means, standard errors, paired tests with correction, what the seeds can tell apart
report      one self-contained HTML file, and the same table in the terminal
"""
