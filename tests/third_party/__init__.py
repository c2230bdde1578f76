"""Every method on Flax models that others wrote, tiny and random: what `jpeft.check` says of each, and what is refused, with the reason.

    make third-party                  # all of it, in a few minutes; the table is benchmarks/results/third_party.md

The models of flax itself run with the other tests; those of packages from PyPI in processes that see the packages in a folder of their own,
since some need older versions than jpeft does.
"""
