"""The study of docs/study.md: does self-rethinking help, on real questions and where steps have to be combined?

``python -m experiments.study`` (``make study``) runs what is missing of it, ``... report`` makes the page's tables.
`settings` says what a run is, `real` and `depth` which runs there are, `plan` their order, `one_run` how one is run,
`runner` goes through them, `results` keeps them, `statistics` and `report` read them.
"""
