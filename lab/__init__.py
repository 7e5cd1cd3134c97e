"""What nobody needs in order to understand the rest: python -m lab.bench, lab.tasks and lab.studies."""
