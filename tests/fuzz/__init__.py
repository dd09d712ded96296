"""Parsers of what others write, under any bytes: by atheris (``python -m tests.fuzz.<target> -max_total_time=60``), and by
pytest, which replays the seeds and a fixed number of mutations of them without it. Extra ``fuzz`` of the distribution."""
