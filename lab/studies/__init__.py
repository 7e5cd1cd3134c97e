"""The papers' claims in miniature, one file a study. `python -m lab.studies all` writes RESULTS.md."""
