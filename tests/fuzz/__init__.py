"""Damaged, odd and hostile input: each is refused in one line that names it, or makes no difference, or the difference is said.

`make fuzz` tries thousands; `test_fuzz.py` tries a small share with fixed seeds.

folders.py      what is damaged: a model, runs, an adapter, tokenizers, data
mutations.py    how: bytes, places, JSON values, safetensors headers
watch.py        runs an operation and records what it returned, printed, wrote and left behind
targets.py      which files are read by which operation, and what a difference may mean
verdict.py      what each outcome is worth
rows.py         data formats: what is written is read, and damage stays where it is
values.py       options: a value of every type for every option
campaign.py     many mutations with one seed, each repeatable alone
table.py        the counts as Markdown
"""
